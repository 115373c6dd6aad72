"""The interface of keys that edits get besides those of their own prompts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from wisecli.artifacts.shard import Evidence
from wisecli.editing.evidence.token_probe import TokenProbe
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.models.prompts.tokenization import Row


@dataclass(frozen=True)
class FittedEdits:
    """Edits whose residuals were found, and a probe that reads further keys for them.

    ``residuals`` are what each answer's positions add (positions, d); ``rows`` are the edits after their bare prompts,
    by their numbers; ``median_norm`` is the length of a state that attention does not rest on.
    """

    probe: TokenProbe
    residuals: Mapping[AnswerKey, Tensor]
    rows: Mapping[int, Row]
    median_norm: float


# Returns what is added to evidence, which holds the keys of edits' own prompts and those that were added before. Why,
# the function's first sentence says; all of them are in :data:`wisecli.editing.evidence.shard_evidence.EXTRA_KEYS`.
ExtraKeys = Callable[[Evidence, FittedEdits], Iterable[Evidence]]
