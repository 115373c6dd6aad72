"""What a shard keeps of its training examples: keys, residuals and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.shard import Evidence
from wisecli.editing.hard_negatives import Elsewhere
from wisecli.editing.training_examples import Lesson

Residual = Callable[[Tensor, Tensor, Tensor], Tensor]


# Keys of one position under two contexts count as the same above this cosine.
_SAME = 0.98


def gather_evidence(lessons: Sequence[Lesson], held_out: int, residual: Residual, inside: Elsewhere) -> Evidence:
    """What a shard was asked to store, read off its lessons.

    Args:
        held_out: the context kept for calibration.
        residual: what should be added, from keys (n, d_ff), answers (n,) and positions (n,).
        inside: keys of each edit's answer after prompts that it does not answer.
    """
    fields: dict[str, list[Tensor]] = {name: [] for name in ("keys", "edit", "position", "context", "answer")}
    for lesson in lessons:
        batch = lesson.activations.batch
        rows, columns = batch.labelled[0], batch.labelled[1] - batch.start
        fields["keys"].append(lesson.activations.keys[rows, columns].float().cpu())
        rows, columns = rows.cpu(), columns.cpu()
        fields["edit"].append(lesson.edits[rows])
        fields["position"].append(columns)
        fields["context"].append(lesson.contexts[rows])
        fields["answer"].append(lesson.answers[rows])
    joined = {name: torch.cat(parts) for name, parts in fields.items()}
    answers = joined.pop("answer")
    residuals = residual(joined["keys"], answers, joined["position"])
    near = torch.zeros(len(joined["keys"]))
    for edit, keys in inside.keys.items():
        own = (joined["position"] > 0) & (joined["edit"] == edit)
        if len(keys) and bool(own.any()):
            near[own] = inside.white.cosines(joined["keys"][own], keys).amax(-1)
    unseen, chat = joined["context"] == held_out, answers < 0
    return thinned(Evidence(residuals=residuals, held_out=unseen, elsewhere=near, chat=chat, **joined))


def thinned(evidence: Evidence) -> Evidence:
    """Leave out keys that are as good as the bare prompt's at the same position.

    Deep in a long target the words before the prompt no longer matter.
    """
    place = evidence.answer * (int(evidence.position.max()) + 1) + evidence.position
    order = torch.full((int(place.max()) + 1,), -1)
    bare = (evidence.context == 0).nonzero().flatten()
    order[place[bare]] = bare
    twin = order[place]
    near = F.cosine_similarity(evidence.keys, evidence.keys[twin], dim=-1) > _SAME
    kept = (evidence.context == 0) | evidence.held_out | ~near | (twin < 0)
    return Evidence(**{name: getattr(evidence, name)[kept] for name in Evidence.__dataclass_fields__})
