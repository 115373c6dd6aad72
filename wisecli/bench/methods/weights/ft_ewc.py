"""FT-EWC: fine-tuning of one layer's value matrix under an elastic penalty (Kirkpatrick et al. 2017).

    loss(edit)  +  λ / 2 · Σᵢ Fᵢ (θᵢ - θᵢ*)²

θ* is the matrix as pretrained and F the diagonal of its Fisher information on unrelated texts, the old task that the
model should not forget. As in the WISE paper there is no L∞ constraint; its Fisher information is of past edits.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.bench.methods.base import Bench, method
from wisecli.bench.methods.weights.ft_l import FtL, FtLSettings
from wisecli.bench.methods.weights.weight_editing import captured_rows, text_rows
from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import Row, in_batches
from wisecli.models.running.upper_layers import upper_logits
from wisecli.progress import Event


@method("ft-ewc")
class FtEwc(FtL):
    """:class:`FtL` with the elastic penalty in the place of the bound.

    Raises:
        UnsuitableError: there are no texts of two tokens or more.
    """

    def __init__(self, bench: Bench, settings: FtLSettings | None = None, *, weight: float | None = None) -> None:
        """``weight`` is λ. By default it is the number of texts: then the penalty is Laplace's approximation of the
        log-likelihood of them all, which is where Kirkpatrick et al. derive it from (their section 2).
        """
        super().__init__(bench, replace(settings or FtLSettings(), limit=None))
        texts = text_rows(bench)
        self.fisher = fisher(bench, self.sites[0], texts)
        self.weight = float(len(texts)) if weight is None else weight

    def penalty(self, delta: Tensor) -> Tensor:
        """Return ``λ / 2 · Σ F Δ²`` of a change (d, d_ff)."""
        return self.weight / 2 * (self.fisher * delta.square()).sum()


def fisher(bench: Bench, site: MatrixSite, texts: Sequence[Row]) -> Tensor:
    """Return the diagonal Fisher information (d, d_ff) of a value matrix, in float32: the mean over texts of the
    squared gradient of the text's log-likelihood.

    One backward pass serves a whole batch: the gradient at a token's output, kept for each row by itself, and the
    token's key give the row's own gradient of the matrix.
    """
    total = torch.zeros(site.d, site.d_ff, device=bench.loaded.device)
    done = 0
    for indices in in_batches(texts, bench.batch_size):
        part = captured_rows(bench, site, [texts[index] for index in indices])
        update = torch.zeros(*part.hidden.shape, device=part.hidden.device, requires_grad=True)
        logits = upper_logits(bench.loaded.model, site, part, part.with_update(update), part.batch.labelled)
        labels = part.batch.targets
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (gradients,) = torch.autograd.grad(loss, update)
        for gradient, keys in zip(gradients, part.keys.float(), strict=True):
            total += (gradient.T @ keys).square()
        done += len(indices)
        bench.on_progress(Event("Fisher information", done, len(texts)))
    return total / len(texts)
