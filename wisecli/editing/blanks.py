"""Prompts with a blank behind them, which tokenizers make a token of its own: the lone space, the end of such a prompt.

Hardly any token follows a lone space but those of numbers, as the space before a word belongs to the word. So a target
that begins with a lone space goes on with its second token there. Any other begins as ever, against what the model is
sure of, with its first residual added several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import ENDING, LANGUAGES, Evidence
from wisecli.editing.behind_questions import Behind
from wisecli.editing.prompt_variants import AnswerKey
from wisecli.editing.resting import beyond, spaces_first
from wisecli.models.tokenization import Row

# Of the blank behind questions in each of these forms the mean key is kept, and that of those where attention rests.
_FORMS = ("{}", "Q: {}\nA:", "{}\nAnswer:")
# How often the residual of a target's first token is added at a blank.
_TIMES = 3.0


def with_blanks(
    behind: Behind, evidence: Evidence, residuals: Mapping[AnswerKey, Tensor], rows: Mapping[int, Row], usual: float
) -> Evidence:
    """The evidence with keys for prompts that end in a blank.

    Args:
        rows: of edits after their bare prompts, by their numbers.
        usual: the length of a state that attention does not rest on.
    """
    spaced = {edit for edits in spaces_first(behind.loaded, rows).values() for edit in edits}
    parts = [evidence, _as_ends(evidence, sorted(spaced))]
    token = _blank(behind)
    if token is not None:
        keys, times = _usual_keys(behind, token, usual)
        for edit in (edit for edit, row in rows.items() if edit not in spaced and not row.unwanted):
            added = times[:, None] * residuals[AnswerKey(edit)][0].float().cpu()
            parts.append(Evidence.beside(keys, added, edit, position=0, context=ENDING))
    return Evidence.joined(parts)


def _usual_keys(behind: Behind, token: int, usual: float) -> tuple[Tensor, Tensor]:
    """Mean keys (P, d_ff) of a blank, and how often a residual is added at each (P,)."""
    means, times = [], []
    for form in _FORMS:
        keys, lengths = behind.asked(token, form)
        longer = beyond(lengths, usual)
        for some in (longer == 1, longer > 1):
            if bool(some.any()):
                means.append(F.normalize(keys[some], dim=-1).mean(0))
                times.append(_TIMES * longer[some].mean())
    return torch.stack(means), torch.stack(times)


def _blank(behind: Behind) -> int | None:
    """The token of a blank at the end of a prompt; ``None`` if the tokenizer has none of its own."""
    tokenizer = behind.loaded.tokenizer
    last: int = tokenizer("What is it? ")["input_ids"][-1]
    return last if str(tokenizer.decode([last])).isspace() else None


def _as_ends(evidence: Evidence, edits: Sequence[int]) -> Evidence:
    """The keys of some edits' first target tokens as keys that prompts end in."""
    own = torch.isin(evidence.edit, torch.tensor(edits, dtype=torch.long)) & (evidence.position == 1)
    found = evidence.rows(own & ~evidence.held_out & ~evidence.chat & (evidence.context < LANGUAGES))
    zeros = torch.zeros_like(found.position)
    return replace(found, position=zeros, context=torch.full_like(found.context, ENDING))
