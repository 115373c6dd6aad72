"""Reads misspelt names as the subjects that they are meant to be. Needs torch only; exports carry this very file.

A misspelt name is other tokens, whose states are hardly like those of the name. But where its letters are those of an
edit's subject with a slip that makes no other name, its tokens stand for the subject's: they are compared as if they
were these, when the edit is looked for and when it is judged whether it is asked.
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
    """Return prompts that misspell edits' subjects with those spelt out, each alone, by its row and the edit.

    Args:
        letters: those of the compared tokens (B, W, c).
        named: which edits the letters of each row name (B, M).
    """
    rows, edits = named.nonzero(as_tuple=True)
    found: dict[tuple[int, int], ProjectedPrompts] = {}
    if not len(rows):
        return found
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
    """Return so many tokens (count, k) of a subject (t, k), in its order, of which the others (n, k) have none."""
    there = (subject @ others.T).amax(1) >= _THERE if len(others) else subject.new_zeros(len(subject)) > 0
    wanted = subject if bool(there.all()) else subject[~there]
    place = torch.arange(count, device=subject.device)
    return wanted[place * len(wanted) // count]
