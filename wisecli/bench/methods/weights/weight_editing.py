"""What methods that rewrite value matrices share: the matrices, and the keys of unrelated text that they spare."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from wisecli.bench.methods.base import Bench, Method, UnsuitableError, changed, require_texts, tensor_bytes
from wisecli.editing.background.key_capture import keys_of_texts
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import Row, collate, encode
from wisecli.models.running.activations import Activations, capture

# Added to a second moment's diagonal, as a share of the diagonal's median: the papers take theirs over a hundred
# thousand texts, and of few texts some directions are seen hardly or never. The median, as first tokens have huge keys.
_SHRINKAGE = 0.01


def at_depth(bench: Bench, layer: int, of: int) -> MatrixSite:
    """Return the site that lies as deep as ``layer`` lies among ``of`` layers; one layer always stays above it."""
    return bench.site(min(round(layer / of * bench.layers), bench.layers - 2))


def between_depths(bench: Bench, first: int, last: int, of: int) -> list[MatrixSite]:
    """Return the value matrices from a layer ``first`` of ``of`` to a layer ``last``, scaled to the model's depth."""
    start, end = (at_depth(bench, layer, of).layer for layer in (first, last))
    return [bench.site(layer) for layer in range(start, end + 1)]


class WeightEditing(Method):
    """A model some of whose value matrices are changed: ``W' = W + Δ``, each Δ (d, d_ff) kept in float32.

    A method that says what its ``portion`` is can go on where it was (:class:`Resumable`); one that holds more than the
    changes has that in its state, too.

    Raises:
        UnsuitableError: the model's layers are streamed, so no matrix stays where it is put.
    """

    def __init__(self, bench: Bench, sites: Sequence[MatrixSite]) -> None:
        if bench.loaded.stream is not None:
            raise UnsuitableError("it rewrites matrices in place, and this model's layers are streamed")
        self.bench, self.sites = bench, tuple(sites)
        # The tensors as they are now: within applied() the parameters hold others.
        self._bases = [self._parameter(site).detach() for site in sites]
        self.deltas = [torch.zeros(site.d, site.d_ff, device=bench.loaded.device) for site in sites]

    def matrix(self, index: int) -> Tensor:
        """Return the matrix of a site as edited so far (d, d_ff), in float32."""
        base = self._bases[index].float()
        return (base.T if self.sites[index].transposed else base) + self.deltas[index]

    def applied(self, first: int | None = None) -> AbstractContextManager[None]:
        """Return the model with its changed matrices; every token sees them, wherever prompts end."""
        del first
        pairs = zip(self.sites, (self.matrix(index) for index in range(len(self.sites))), strict=True)
        values = [matrix.T.contiguous() if site.transposed else matrix for site, matrix in pairs]
        return changed([self._parameter(site) for site in self.sites], values)

    def bytes(self) -> int:
        """Return the size of the changes."""
        return tensor_bytes(*self.deltas)

    def state(self) -> dict[str, Tensor]:
        """Return the changes."""
        return {f"delta {index}": delta for index, delta in enumerate(self.deltas)}

    def restore(self, state: Mapping[str, Tensor], portions: Sequence[Sequence[Edit]]) -> None:
        """Restore stored changes, which need no edits."""
        del portions
        self.deltas = [state[f"delta {index}"].to(delta) for index, delta in enumerate(self.deltas)]

    def _parameter(self, site: MatrixSite) -> nn.Parameter:
        return site.watched(self.bench.loaded.model).get_parameter("weight")


def encode_row(bench: Bench, prompt: str, edit: Edit, *, end: int | None = None) -> Row:
    """Return a prompt with an edit's target as a row.

    Args:
        end: a token to close the target with.

    Raises:
        UnsuitableError: the tokenizer leaves nothing of it.
    """
    try:
        return encode(bench.loaded.tokenizer, prompt, edit.target, end=end)
    except ValueError as error:
        raise UnsuitableError(f"edit {edit.id!r} cannot be used: {error}") from None


def text_rows(bench: Bench) -> Sequence[Row]:
    """Return the bench's texts as rows of which everything but the first token is the target.

    Raises:
        UnsuitableError: there are no texts of two tokens or more.
    """
    tokens = (tuple(bench.loaded.tokenizer(text)["input_ids"]) for text in bench.texts)
    return require_texts([Row(ids[:1], ids[1:]) for ids in tokens if len(ids) > 1])


def captured_rows(bench: Bench, site: MatrixSite, rows: Sequence[Row], *, above: bool = True) -> Activations:
    """Return rows captured at a site, in one batch."""
    return capture(bench.loaded.model, site, collate(rows).to(bench.loaded.device), above=above)


def second_moment(bench: Bench, site: MatrixSite) -> Tensor:
    """Return ``E[k kᵀ]`` (d_ff, d_ff) as :func:`seen_moment`, shrunk so that it is safe to invert."""
    moment = seen_moment(bench, site)
    moment.diagonal().add_(_SHRINKAGE * moment.diagonal().median())
    return moment


def seen_moment(bench: Bench, site: MatrixSite) -> Tensor:
    """Return ``E[k kᵀ]`` (d_ff, d_ff) over every token of the bench's texts, in float64, as it is measured.

    Raises:
        UnsuitableError: there are no texts.
    """
    texts = require_texts(bench.texts)
    keys = keys_of_texts(bench.loaded, site, texts, batch_size=bench.batch_size, on_progress=bench.on_progress).keys
    moment = torch.zeros(site.d_ff, site.d_ff, dtype=torch.float64, device=keys.device)
    for part in keys.split(4096):  # in float64 the keys would take twice what they do
        moment += part.double().T @ part.double()
    return moment / len(keys)
