"""Prompts with a blank after them, which tokenizers make a token of its own: the lone space, the end of such a prompt.

Hardly any token follows a lone space but those of numbers, as the space before a word belongs to the word. So a target
that begins with a lone space goes on with its second token there. Any other begins as ever, against what the model is
sure of, with its first residual added several times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wisecli.artifacts.shard import FIRST_LANGUAGE, SPACE_CONTEXT, Evidence
from wisecli.editing.evidence.attention_sinks import edits_by_leading_space, norm_ratio
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.token_probe import TokenProbe, mean_direction
from wisecli.editing.examples.prompt_variants import AnswerKey

# Of the blank after questions in each of these forms the mean key is kept, and that of those where attention rests.
_FORMS = ("{}", "Q: {}\nA:", "{}\nAnswer:")
# How often the residual of a target's first token is added at a blank.
_TIMES = 3.0


def trailing_space_evidence(evidence: Evidence, edits: FittedEdits) -> Iterator[Evidence]:
    """Yield keys for prompts that end in a blank, which tokenizers make a token of its own."""
    probe, rows = edits.probe, edits.rows
    spaced = {number for numbers in edits_by_leading_space(probe.loaded, rows).values() for number in numbers}
    yield _as_prompt_ends(evidence, sorted(spaced))
    token = _space_token(probe)
    if token is not None:
        keys, times = _mean_keys(probe, token, edits.median_norm)
        for number in (number for number, row in rows.items() if number not in spaced and not row.unwanted):
            added = times[:, None] * edits.residuals[AnswerKey(number)][0].float().cpu()
            yield Evidence.extra_keys(keys, added, number, position=0, context=SPACE_CONTEXT)


def _mean_keys(probe: TokenProbe, token: int, median_norm: float) -> tuple[Tensor, Tensor]:
    """Return mean keys (P, d_ff) of a blank, and how many times a residual is added at each (P,)."""
    means, times = [], []
    for form in _FORMS:
        keys, lengths = probe.keys_after_questions(token, form)
        ratios = norm_ratio(lengths, median_norm)
        for kind in (ratios == 1, ratios > 1):
            if bool(kind.any()):
                means.append(mean_direction(keys[kind]))
                times.append(_TIMES * ratios[kind].mean())
    return torch.stack(means), torch.stack(times)


def _space_token(probe: TokenProbe) -> int | None:
    """Return the token of a blank at the end of a prompt; ``None`` if the tokenizer has none of its own."""
    tokenizer = probe.loaded.tokenizer
    last: int = tokenizer("What is it? ")["input_ids"][-1]
    return last if str(tokenizer.decode([last])).isspace() else None


def _as_prompt_ends(evidence: Evidence, edits: Sequence[int]) -> Evidence:
    """Return the keys of some edits' first target tokens as keys that prompts end in."""
    own = torch.isin(evidence.edit, torch.tensor(edits, dtype=torch.long)) & (evidence.position == 1)
    found = evidence.rows(own & ~evidence.held_out & ~evidence.chat & (evidence.context < FIRST_LANGUAGE))
    zeros = torch.zeros_like(found.position)
    return replace(found, position=zeros, context=torch.full_like(found.context, SPACE_CONTEXT))
