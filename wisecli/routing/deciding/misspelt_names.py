"""Reads misspelt names as the subjects that they are meant to be. Needs torch only; exports carry this very file.

A misspelt name has other tokens than the name, and their states are hardly alike. Where a word of a prompt is one of an
edit's subject but for a slip that makes no other name, the word's tokens are replaced by tokens of the subject before
prompt and edit are compared: to find the edit, and for the gates to judge whether the prompt asks it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wisecli.routing.deciding.fuzzy_match import FuzzyMatch
from wisecli.routing.deciding.late_interaction import LateInteraction, ProjectedPrompts

# An edit that a prompt means less likely than this is not looked for in its letters.
MIN_MISSPELT_PROB = 0.01
# A subject's token is there if one of the prompt is as like it as this.
_THERE = 0.9


def read_as_meant(
    prompts: ProjectedPrompts, letters: Tensor, named: Tensor, late_interaction: LateInteraction, spelling: FuzzyMatch
) -> dict[tuple[int, int], ProjectedPrompts]:
    """Return each prompt that misspells an edit's subject, with the subject's tokens in the place of the misspelt
    words', by the prompt's row and the edit's number.

    Args:
        prompts: the compared tokens of B prompts; those that are returned are of one each.
        letters: the letters of these tokens (B, W, c).
        named: which edits the letters of each row name (B, M).
    """
    rows, edits = named.nonzero(as_tuple=True)
    found: dict[tuple[int, int], ProjectedPrompts] = {}
    subjects = late_interaction.edit_tokens(edits)
    for row, edit, (subject, _) in zip(rows.tolist(), edits.tolist(), subjects, strict=True):
        own, one = prompts.mask[row], slice(row, row + 1)
        tokens = prompts.projected[0, row]
        # Where all of the subject's tokens are there, nothing is misspelt.
        if not len(subject) or float((subject @ tokens[own].T).amax(1).min()) >= _THERE:
            continue
        misspelt = spelling.misspelt(letters[row], edit)
        if bool(misspelt.any()):
            spelt = prompts.projected[:, one].clone()
            spelt[0, 0, misspelt] = _in_place(tokens[own & ~misspelt], subject, int(misspelt.sum()))
            found[row, edit] = ProjectedPrompts(spelt, prompts.mask[one])
    return found


def _in_place(others: Tensor, subject: Tensor, count: int) -> Tensor:
    """Return ``count`` of those tokens of a subject (t, k) that are not among others (n, k), in their order; with too
    few of them each several times: (count, k).
    """
    there = (subject @ others.T).amax(1) >= _THERE if len(others) else subject.new_zeros(len(subject)) > 0
    wanted = subject if bool(there.all()) else subject[~there]
    place = torch.arange(count, device=subject.device)
    return wanted[place * len(wanted) // count]
