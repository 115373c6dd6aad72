from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wisecli.routing import ann_index
from wisecli.routing.ann_index import build_index
from wisecli.routing.prompts import UNROUTED
from wisecli.routing.scores import SideMemory
from wisecli.routing.side_memory import RoutedMatrix

D_FF, KEYS, EDITS = 16, 2000, 500


def lookup(*, keys: int = KEYS, routing: str = "token") -> RoutedMatrix:
    generator = torch.Generator().manual_seed(0)
    probes = nn.functional.normalize(torch.randn(keys, D_FF, generator=generator), dim=-1)
    tensors: dict[str, Tensor] = {
        "probes": probes,
        "owner": torch.arange(keys) % EDITS,
        "offset": 0.1 * torch.rand(keys, generator=generator) - 0.05,
        "metric": torch.randint(2, (keys,), generator=generator),
        "directions": torch.linalg.qr(torch.randn(2, D_FF, 4, generator=generator)).Q.mT.contiguous(),
        "gains": torch.rand(2, 4, generator=generator),
        "floors": torch.tensor([1.0, 0.8]),
        "values": torch.randn(keys, 3, generator=generator),
        "value": torch.arange(keys),
    }
    memory = SideMemory(tensors, (0.8,) * EDITS, "key", routing, kind="lookup")
    return RoutedMatrix(nn.Linear(D_FF, 3, bias=False), memory, transposed=False)


def opened(routed: RoutedMatrix, keys: torch.Tensor) -> torch.Tensor:
    return opened_of(*routed.nearest(keys))


def opened_of(strength: Tensor, nearest: Tensor) -> Tensor:
    return nearest.where(strength > 1, UNROUTED)


@pytest.mark.parametrize("known", [0.5, 0.02])
def test_of_keys_that_ask_for_a_subject_the_index_finds_the_nearest_whose_subject_is_named(
    monkeypatch: pytest.MonkeyPatch, known: float
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(ann_index, "INDEXED_ABOVE", KEYS - 1)
    routed = lookup(routing="sequence")
    generator = torch.Generator().manual_seed(2)
    routed.register_buffer("asks", (torch.rand(KEYS, generator=generator) < 0.9) & (routed.metric != ann_index.INSIDE))
    near = routed.probes[:600] + 0.05 * torch.randn(600, D_FF, generator=generator)
    keys, named = near.view(20, 30, D_FF), torch.rand(20, 1, EDITS, generator=generator) < known
    exact = opened_of(*routed.nearest(keys, named))
    assert bool((exact != opened_of(*routed.nearest(keys))).any())
    routed.index = build_index(routed)
    found = opened_of(*routed.nearest(keys, named))
    assert float((found == exact).float().mean()) >= 0.95
    place = found[found != UNROUTED]
    row = torch.arange(20)[:, None].expand(20, 30)[found != UNROUTED]
    assert bool((~routed.asks[place] | named[row, 0, routed.owner[place]]).all())


def test_the_only_key_that_a_prompt_ends_in_asks_for_its_subject_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(ann_index, "INDEXED_ABOVE", KEYS - 1)
    routed = lookup(routing="sequence")
    routed.metric.fill_(ann_index.INSIDE)[0] = 0
    routed.register_buffer("asks", routed.metric != ann_index.INSIDE)
    routed.index = build_index(routed)
    whitened = torch.linalg.solve(
        routed.floors[0] * torch.eye(D_FF)
        + routed.directions[0].T @ torch.diag(routed.gains[0]) @ routed.directions[0],
        routed.probes[0],
    )
    named = torch.zeros(1, 1, EDITS, dtype=torch.bool)
    for known, place in ((False, UNROUTED), (True, 0)):
        named[0, 0, routed.owner[0]] = known
        found = opened_of(*routed.nearest(whitened[None, None], named))
        assert found.tolist() == [[place]]


def test_small_lookups_are_compared_with_all_keys() -> None:
    assert build_index(lookup()) is None


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_the_index_finds_nearly_every_edit_that_comparing_with_all_finds(
    monkeypatch: pytest.MonkeyPatch, routing: str
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(ann_index, "INDEXED_ABOVE", KEYS - 1)
    routed = lookup(routing=routing)
    generator = torch.Generator().manual_seed(1)
    near = routed.probes[:300] + 0.05 * torch.randn(300, D_FF, generator=generator)
    keys = torch.cat([near, torch.randn(300, D_FF, generator=generator)]).view(20, 30, D_FF)
    exact = opened(routed, keys)
    assert bool((exact == UNROUTED).any()) and bool((exact != UNROUTED).any())
    routed.index = build_index(routed)
    assert routed.index is not None
    found = opened(routed, keys)
    assert found.shape == exact.shape
    assert float((found == exact).float().mean()) >= 0.95
    wrong = found[(found != exact)]
    assert not bool((found[exact == UNROUTED] != UNROUTED).any()), wrong
