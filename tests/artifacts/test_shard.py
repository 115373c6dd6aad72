import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import wise as reference
from safetensors.torch import load_file
from support.drawing import seeded
from torch import Tensor

from wisecli.artifacts.masks import disjoint_masks, random_mask
from wisecli.artifacts.shard import Evidence, Mask, MaskKind, Shard, half, load_shard, save_shard
from wisecli.editing.run.job import split_edits
from wisecli.errors import DamagedFileError, SettingsError
from wisecli.io.checkpoint import save_tensors
from wisecli.io.digest import sha256_file
from wisecli.models.layout.site import MatrixSite

KINDS: tuple[MaskKind, ...] = ("columns", "elements")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def site(d: int, d_ff: int) -> MatrixSite:
    return MatrixSite("llama", 2, "model.layers.2", "model.layers.2.mlp.down_proj", transposed=False, d=d, d_ff=d_ff)


def mask_of(kind: MaskKind, d: int = 5, d_ff: int = 7, density: float = 0.4, seed: int = 0) -> Mask:
    return random_mask(site(d, d_ff), density, kind, seeded(seed))


def dense_by_hand(mask: Mask, values: Tensor) -> Tensor:
    return reference.dense(mask.indices.tolist(), values, (mask.d, mask.d_ff), columns=mask.kind == "columns")


# --- masks ---


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.sampled_from([2, 3]),
    density=st.floats(0.05, 0.95),
    d=st.integers(20, 60),
    d_ff=st.integers(20, 80),
    seed=st.integers(0, 2**31),
)
def test_random_masks_overlap_in_the_share_that_their_density_says(
    kind: MaskKind, count: int, density: float, d: int, d_ff: int, seed: int
) -> None:
    chance = seeded(seed)
    if kind == "columns":
        d, d_ff = 2, d * d_ff  # as many columns as the other kind has elements, so that the bound is as tight
    masks = [random_mask(site(d, d_ff), density, kind, chance) for _ in range(count)]
    size = d_ff if kind == "columns" else d * d_ff
    shared = set.intersection(*(set(mask.indices.tolist()) for mask in masks))
    expected = density**count
    # Six standard deviations of a binomial; rounding a mask's size shifts the mean by less than one place a mask.
    allowed = 6 * math.sqrt(size * expected * (1 - expected)) + count
    assert abs(len(shared) - size * expected) <= allowed


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), count=st.integers(1, 5), d_ff=st.integers(20, 60), seed=st.integers(0, 99))
def test_disjoint_masks_share_no_place_and_fill_the_matrix(kind: MaskKind, count: int, d_ff: int, seed: int) -> None:
    size = d_ff if kind == "columns" else 3 * d_ff
    masks = disjoint_masks(site(3, d_ff), size // count / size, kind, count, seeded(seed))
    places = [place for mask in masks for place in mask.indices.tolist()]
    assert len(masks) == count
    assert len({len(mask.indices) for mask in masks}) == 1
    assert len(places) == len(set(places)) == size // count * count
    assert set(places) <= set(range(size))


def test_disjoint_masks_that_do_not_fit_are_refused_with_the_density_that_does() -> None:
    with pytest.raises(SettingsError, match=r"3 disjoint masks of .*=0.5 .* give --set mask_ratio=0.333 or less"):
        disjoint_masks(site(4, 9), 0.5, "columns", 3, seeded())
    assert len(disjoint_masks(site(4, 9), 0.333, "columns", 3, seeded())) == 3


@both_kinds
def test_masks_overlap_on_average_in_exactly_that_share(kind: MaskKind) -> None:
    chance, size, rounds = seeded(), {"columns": 100, "elements": 400}[kind], 400
    overlaps = []
    for _ in range(rounds):
        first, second = (random_mask(site(4, 100), 0.3, kind, chance).indices for _ in range(2))
        overlaps.append(float(torch.isin(first, second).sum()) / size)
    mean, error = sum(overlaps) / rounds, math.sqrt(0.09 * 0.91 / size / rounds)
    assert abs(mean - 0.09) < 5 * error


@both_kinds
@pytest.mark.parametrize(
    ("density", "columns", "elements"), [(1e-9, 1, 1), (0.2, 8, 40), (0.5, 20, 100), (0.99, 40, 198), (1.0, 40, 200)]
)
def test_a_mask_has_exactly_its_size(kind: MaskKind, density: float, columns: int, elements: int) -> None:
    mask = random_mask(site(5, 40), density, kind, seeded())
    count = columns if kind == "columns" else elements
    assert mask.shape == ((5, count) if kind == "columns" else (count,))
    indices = mask.indices.tolist()
    assert len(set(indices)) == count
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] < (40 if kind == "columns" else 200)


@both_kinds
def test_a_mask_is_decided_by_its_generator(kind: MaskKind) -> None:
    assert torch.equal(mask_of(kind, seed=3).indices, mask_of(kind, seed=3).indices)
    chance = seeded(3)
    first, second = (random_mask(site(20, 40), 0.5, kind, chance) for _ in range(2))
    assert not torch.equal(first.indices, second.indices)


@both_kinds
def test_every_place_is_drawn_equally_often(kind: MaskKind) -> None:
    chance, size, rounds = seeded(), {"columns": 10, "elements": 40}[kind], 2000
    drawn = torch.zeros(size)
    for _ in range(rounds):
        drawn[random_mask(site(4, 10), 0.3, kind, chance).indices] += 1
    error = math.sqrt(rounds * 0.3 * 0.7)
    assert float((drawn - 0.3 * rounds).abs().max()) < 5 * error


@both_kinds
def test_dense_fills_the_mask_and_nothing_else(kind: MaskKind) -> None:
    mask = mask_of(kind)
    values = torch.randn(mask.shape, generator=seeded(1))
    assert torch.equal(mask.dense(values), dense_by_hand(mask, values))


@both_kinds
def test_dense_is_what_update_does_to_the_basis_vectors(kind: MaskKind) -> None:
    mask = mask_of(kind)
    values = torch.randn(mask.shape, generator=seeded(1))
    images = mask.update(mask.restrict(torch.eye(mask.d_ff)), values)
    assert torch.equal(images.T, mask.dense(values))


@both_kinds
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_update_is_the_dense_change_times_the_key(kind: MaskKind, leading: tuple[int, ...]) -> None:
    mask = mask_of(kind)
    values = torch.randn(mask.shape, generator=seeded(1))
    keys = torch.randn(*leading, mask.d_ff, generator=seeded(2))
    expected = keys @ dense_by_hand(mask, values).T
    assert torch.allclose(mask.update(mask.restrict(keys), values), expected, atol=1e-6)


@both_kinds
def test_the_gradient_of_an_update_is_the_outer_product_inside_the_mask(kind: MaskKind) -> None:
    mask = mask_of(kind)
    values = torch.zeros(mask.shape, requires_grad=True)
    keys, upstream = torch.randn(6, mask.d_ff, generator=seeded(1)), torch.randn(6, mask.d, generator=seeded(2))
    mask.update(mask.restrict(keys), values).backward(upstream)
    outer = upstream.T @ keys
    expected = outer[:, mask.indices] if kind == "columns" else outer.flatten()[mask.indices]
    assert values.grad is not None
    assert torch.allclose(values.grad, expected, atol=1e-5)


@both_kinds
def test_the_gradient_of_an_update_agrees_with_differences(kind: MaskKind) -> None:
    mask = mask_of(kind, d=3, d_ff=4)
    values = torch.randn(mask.shape, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    keys = mask.restrict(torch.randn(2, mask.d_ff, dtype=torch.float64, generator=seeded(2)))
    assert torch.autograd.gradcheck(lambda filled: mask.update(keys, filled).sin(), (values,))


@both_kinds
def test_a_mask_moves_to_another_device(kind: MaskKind) -> None:
    moved = mask_of(kind).to(torch.device("meta"))
    assert moved.indices.device.type == "meta"
    assert (moved.kind, moved.d, moved.d_ff, moved.shape) == (kind, 5, 7, mask_of(kind).shape)


# --- edits dealt to shards ---


@given(count=st.integers(1, 3000), data=st.data())
def test_edits_are_dealt_in_order_and_evenly(count: int, data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, min(count, 200)))
    parts = split_edits(count, shards=shards, edits_per_shard=100)
    assert list(itertools.chain.from_iterable(parts)) == list(range(count))
    sizes = [len(part) for part in parts]
    assert len(sizes) == shards
    assert max(sizes) - min(sizes) <= 1


@given(count=st.integers(1, 3000), each=st.integers(1, 400))
def test_without_a_number_there_are_as_few_shards_as_hold_the_edits(count: int, each: int) -> None:
    sizes = [len(part) for part in split_edits(count, shards=None, edits_per_shard=each)]
    assert sum(sizes) == count
    assert len(sizes) == -(-count // each)
    assert 1 <= min(sizes) <= max(sizes) <= each


def test_more_shards_than_edits_are_refused() -> None:
    assert split_edits(3, shards=3, edits_per_shard=100) == [range(1), range(1, 2), range(2, 3)]
    with pytest.raises(SettingsError, match="--set shards=4 is more than the 3 edits"):
        split_edits(3, shards=4, edits_per_shard=100)


# --- shard files ---


def some_shard(kind: MaskKind) -> Shard:
    mask = mask_of(kind, d=6, d_ff=9)
    chance = seeded(1)
    evidence = Evidence(
        keys=torch.randn(8, 9, generator=chance).half().float(),
        residuals=torch.randn(8, 6, generator=chance).half().float(),
        edit=torch.arange(8) // 2,
        position=torch.arange(8) % 2,
        context=torch.arange(8) % 3,
        held_out=torch.arange(8) % 3 == 2,
        chat=torch.arange(8) % 4 == 1,
        call=torch.rand(8, generator=chance) if kind == "elements" else None,
        token=torch.arange(8) * 5,
    )
    return Shard(mask, torch.randn(mask.shape, generator=chance), evidence)


@both_kinds
def test_a_shard_survives_being_written(tmp_path: Path, kind: MaskKind) -> None:
    shard, path = some_shard(kind), tmp_path / "shard-00000.safetensors"
    save_shard(path, shard, seed=0, edits=["first"])
    loaded = load_shard(path, site(6, 9), kind, sha256_file(path))
    assert loaded.mask.kind == kind
    assert torch.equal(loaded.mask.indices, shard.mask.indices)
    assert torch.equal(loaded.values, shard.values)
    assert torch.equal(loaded.mask.dense(loaded.values), shard.mask.dense(shard.values))
    for field in dataclasses.fields(Evidence):
        if field.name == "call" and kind == "columns":
            assert loaded.evidence.call is None
            continue
        assert torch.equal(getattr(loaded.evidence, field.name), getattr(shard.evidence, field.name)), field.name
    assert loaded.evidence.held_out.dtype == torch.bool


@both_kinds
def test_the_same_shard_makes_the_same_bytes(tmp_path: Path, kind: MaskKind) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_shard(first, some_shard(kind), seed=0, edits=["first"])
    save_shard(second, load_shard(first, site(6, 9), kind, sha256_file(first)), seed=0, edits=["first"])
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_shard(tmp_path / "shard.safetensors", some_shard("columns"), seed=0, edits=["first"])
    return tmp_path / "shard.safetensors"


def test_an_altered_truncated_or_missing_shard_is_refused(stored: Path) -> None:
    digest, whole = sha256_file(stored), stored.read_bytes()
    altered = whole[:-1] + bytes([whole[-1] ^ 1])
    for content, says in ((altered, "sha256"), (whole[:-3], "not a whole safetensors file"), (None, "no such file")):
        stored.unlink() if content is None else stored.write_bytes(content)
        with pytest.raises(DamagedFileError, match=says):
            load_shard(stored, site(6, 9), "columns", digest)


@pytest.mark.parametrize("missing", ["mask.indices", "delta.values", "evidence.keys", "evidence.held_out"])
def test_a_shard_without_one_of_its_tensors_is_refused(stored: Path, missing: str) -> None:
    save_tensors(stored, {name: tensor.clone() for name, tensor in load_file(stored).items() if name != missing})
    with pytest.raises(DamagedFileError, match=f"tensor {missing} is missing"):
        load_shard(stored, site(6, 9), "columns", sha256_file(stored))


@pytest.mark.parametrize(("read_as", "d"), [("elements", 6), ("columns", 7)])
def test_a_shard_that_does_not_fit_the_site_is_refused(stored: Path, read_as: MaskKind, d: int) -> None:
    with pytest.raises(DamagedFileError, match=r"tensor delta\.values should be"):
        load_shard(stored, site(d, 9), read_as, sha256_file(stored))


@pytest.mark.parametrize(
    ("values", "dtype"), [((0.5, -2.0, 65504.0), torch.float16), ((0.5, 70000.0), torch.float32), ((), torch.float16)]
)
def test_half_precision_is_used_where_nothing_overflows(values: Sequence[float], dtype: torch.dtype) -> None:
    assert half(torch.tensor(values)).dtype == dtype
    assert torch.equal(half(torch.tensor(values)).float(), torch.tensor(values))


def test_keys_too_large_for_half_precision_survive(tmp_path: Path) -> None:
    shard, path = some_shard("columns"), tmp_path / "shard-00000.safetensors"
    shard.evidence.keys[0, 0] = 123456.0
    save_shard(path, shard, seed=0, edits=["first"])
    loaded = load_shard(path, site(6, 9), "columns", sha256_file(path))
    assert torch.equal(loaded.evidence.keys, shard.evidence.keys)
