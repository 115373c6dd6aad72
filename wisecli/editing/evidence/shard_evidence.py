"""What a shard keeps of its training examples: keys, residuals and where they come from."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import Evidence
from wisecli.editing.evidence.attention_sinks import attention_sink_evidence, residual_scale
from wisecli.editing.evidence.begun_answers import begun_answer_evidence
from wisecli.editing.evidence.extra_keys import ExtraKeys, FittedEdits
from wisecli.editing.evidence.trailing_space import trailing_space_evidence
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples

# What should be added at keys (n, d_ff), from these, their n answers and their positions (n,): (n, d).
Residual = Callable[[Tensor, Sequence[AnswerKey], Tensor], Tensor]


# Keys that edits get besides those of their prompts, in the order in which they are added.
EXTRA_KEYS: tuple[ExtraKeys, ...] = (attention_sink_evidence, trailing_space_evidence, begun_answer_evidence)
# Keys of one position under two contexts count as the same above this cosine.
_SAME = 0.98


def gather_evidence(
    batches: Sequence[TrainingExamples], held_out: int, residual: Residual, *, median_norm: float = math.inf
) -> Evidence:
    """Return a shard's evidence, the keys and residuals of its edits, from its training examples.

    Args:
        held_out: the context kept for calibration.
        residual: what should be added at each key.
        median_norm: the length of a state that attention does not rest on, if residuals are stretched by it.
    """
    fields: dict[str, list[Tensor]] = {name: [] for name in ("keys", "token", "edit", "position", "context", "stretch")}
    answers: list[AnswerKey] = []
    for examples in batches:
        batch = examples.activations.batch
        rows, columns = batch.labelled[0], batch.labelled[1] - batch.start
        fields["keys"].append(examples.activations.keys[rows, columns].float().cpu())
        fields["stretch"].append(residual_scale(examples.activations, median_norm)[rows, columns].cpu())
        fields["token"].append(batch.ids[batch.labelled[0], batch.labelled[1]].cpu())
        rows, columns = rows.cpu(), columns.cpu()
        fields["edit"].append(examples.edits[rows])
        fields["position"].append(columns)
        fields["context"].append(examples.contexts[rows])
        answers += [examples.answers[row] for row in rows.tolist()]
    joined = {name: torch.cat(parts) for name, parts in fields.items()}
    residuals = residual(joined["keys"], answers, joined["position"]) * joined.pop("stretch")[:, None]
    unseen = joined["context"] == held_out
    chat = torch.tensor([answer.chat for answer in answers])
    return thinned(Evidence(residuals=residuals, held_out=unseen, chat=chat, **joined))


def with_extra_keys(evidence: Evidence, edits: FittedEdits) -> Evidence:
    """Return evidence with all ``EXTRA_KEYS`` of its edits."""
    for keys_of in EXTRA_KEYS:
        evidence = Evidence.joined([evidence, *keys_of(evidence, edits)])
    return evidence


def thinned(evidence: Evidence) -> Evidence:
    """Return the evidence without those keys that are as good as the bare prompt's at the same position.

    Deep in a long target the words before the prompt no longer matter.
    """
    place = evidence.answer * (int(evidence.position.max()) + 1) + evidence.position
    order = torch.full((int(place.max()) + 1,), -1)
    bare = (evidence.context == 0).nonzero().flatten()
    order[place[bare]] = bare
    twin = order[place]
    near = F.cosine_similarity(evidence.keys, evidence.keys[twin], dim=-1) > _SAME
    kept = (evidence.context == 0) | evidence.held_out | ~near | (twin < 0)
    return evidence.rows(kept)
