"""Answers that the assistant's turn begins before it says them ("It is"), written there by whoever asks.

A prompt in the chat template ends where the assistant's turn opens, so such a beginning is part of the answer, and none
of an edit's own keys comes near it. Its last token says little of what was asked, so that keys after made-up questions
do for all edits; the target then goes on as it does after the bare prompt.
"""

from collections.abc import Iterator

import torch

from wisecli.artifacts.shard import BEGUN_CONTEXT, Evidence
from wisecli.editing.evidence.extra_keys import FittedEdits
from wisecli.editing.evidence.token_probe import mean_direction
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.models.prompts.chat_template import chat_prompt

# What answers are begun with; of each the mean key of the last token is kept.
_BEGINNINGS = ("It is", "The answer is", "I think that it is")


def begun_answer_evidence(_evidence: Evidence, edits: FittedEdits) -> Iterator[Evidence]:
    """Yield keys for answers that are begun in the chat template before the target."""
    probe, tokenizer = edits.probe, edits.probe.loaded.tokenizer
    if not tokenizer.chat_template:
        return
    means = []
    for beginning in _BEGINNINGS:
        before, token = beginning.rpartition(" ")[0], tokenizer(beginning, add_special_tokens=False)["input_ids"][-1]
        keys, _ = probe.keys_after_questions(token, chat_prompt(tokenizer, "{}") + before)
        means.append(mean_direction(keys))
    for number, row in edits.rows.items():
        if not row.unwanted:
            added = edits.residuals[AnswerKey(number)][0].float().cpu().expand(len(means), -1)
            yield Evidence.extra_keys(torch.stack(means), added, number, position=0, context=BEGUN_CONTEXT)
