"""Requests and edits whose tokens have given cosines with each other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.gating.sentence_features import EditCosines


def edit_cosines(given: Sequence[Sequence[Tensor]]) -> EditCosines:
    """Return cosines of requests with the unit vectors of a subject's and a relation's tokens, (n, t) twice each."""
    size = max(part.shape[1] for own in given for part in own)
    projected = [torch.stack([F.pad(part, (0, size - part.shape[1])) for part in own]) for own in given]
    eye = torch.eye(size)
    return EditCosines.of(projected, [(eye[: one.shape[1]], eye[: other.shape[1]]) for one, other in given])
