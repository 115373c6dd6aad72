"""Values of answers: what is added behind the last layer for a token to come next.

There nothing but the norm and the head follows, so that no later token sees what was added. With ``w`` (d,) the head's
rows times the norm's weights, ``m`` their mean and ``C`` their covariance, the direction for a token is the one of the
least squared logits beside that token's, ``C⁻¹ (w - m)``: by it the token leads all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.export.stock.edit_states import Next
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded

# What is added to a covariance, as a share of its mean eigenvalue; how far away from what is erased is enough. Farther,
# tokens would lead that the model would not have said instead.
_RIDGE, _AWAY = 1.0, 0.2


def answer_values(loaded: Loaded, site: Site, then: Sequence[Next]) -> Tensor:
    """Return directions (n, d), each for what comes next in an answer, of length 1; or away from what is erased, and as
    short as leaves the likeliest of all else: 0 where nothing is unwanted.
    """
    norm = loaded.model.get_submodule(f"{site.layer_module.rsplit('.', 2)[0]}.norm").get_parameter("weight")
    head = loaded.model.get_output_embeddings().get_parameter("weight")
    rows = head.detach().float().cpu() * norm.detach().float().cpu()
    mean = rows.mean(0)
    spread = ((rows.T @ rows) / len(rows) - mean.outer(mean)).double()
    spread += _RIDGE * spread.diagonal().mean() * torch.eye(len(spread))
    sums = [
        rows[following.token] - mean if following.unwanted is None else (mean - rows[list(following.unwanted)]).sum(0)
        for following in then
    ]
    lengths = torch.tensor([1.0 if following.unwanted is None else _AWAY for following in then])
    return F.normalize(torch.linalg.solve(spread, torch.stack(sums).double().T).T.float(), dim=-1) * lengths[:, None]
