from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.helpers import (
    Waits,
    alone,
    choice_of,
    choose,
    hooked,
    memory_for,
    random_rows,
    routed_by_loop,
    row_of,
    site_of,
)
from support.helpers import keys_of as keys_of_tokens
from support.tiny_models import TINY_CONFIGS, VOCABULARY, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from wisecli.routing.router import Reading, decide, residual

from wisecli.models.forward_pass import CACHE_ARGUMENT
from wisecli.models.generation import left_padded
from wisecli.routing.passes import PassRoute, in_pass
from wisecli.routing.prompts import UNROUTED
from wisecli.routing.scores import INSIDE, REACH, SideMemory
from wisecli.routing.side_memory import RoutedMatrix, activation_of, install
from wisecli.routing.token_cache import last_memory

D, D_FF, READ, RANK = 6, 10, 4, 3
MODES = ("norm", "key", "lookup")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(*, bias: bool) -> nn.Linear:
    module = nn.Linear(D_FF, D, bias=bias).requires_grad_(False)
    module.weight.copy_(normal(D, D_FF, seed=1))
    if bias:
        module.bias.copy_(normal(D, seed=2))
    return module


def conv1d() -> Conv1D:
    module = Conv1D(D, D_FF).requires_grad_(False)
    module.weight.copy_(normal(D_FF, D, seed=1))
    module.bias.copy_(normal(D, seed=2))
    return module


BASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "linear": (lambda: linear(bias=False), False),
    "linear with bias": (lambda: linear(bias=True), False),
    "conv1d": (conv1d, True),
}
bases = pytest.mark.parametrize(("base", "transposed"), BASES.values(), ids=BASES)


class Plain:
    """What a memory is made of, before anything is packed: dense changes or residuals, edits' keys and the whitenings.

    A mode is a router of matrices, or ``lookup``, where every memory is an edit with two residuals.
    """

    def __init__(self, memories: int, *, d: int = D, d_ff: int = D_FF, keys_each: int = 2) -> None:
        self.changes = torch.zeros(memories, d, d_ff)
        self.columns = torch.stack(
            [torch.randperm(d_ff, generator=seeded(m))[:READ].sort().values for m in range(memories)]
        )
        for number, columns in enumerate(self.columns):
            self.changes[number][:, columns] = normal(d, READ, seed=10 + number)
        self.directions = torch.stack([torch.linalg.qr(normal(d_ff, RANK, seed=seed))[0].T for seed in (3, 30)])
        self.gains, self.floors = torch.tensor([[-0.6, -0.4, 1.5], [2.0, 0.3, -0.2]]), torch.tensor([0.9, 0.5])
        self.whitenings = [
            floor * torch.eye(d_ff) + directions.T @ torch.diag(gains) @ directions
            for directions, gains, floor in zip(self.directions, self.gains, self.floors, strict=True)
        ]
        self.keys = normal(memories * keys_each, d_ff, seed=4)
        place = torch.arange(memories * keys_each)
        self.owner, self.metric = place % memories, (place + place // memories) % 2
        self.factors = 1 + normal(memories * keys_each, seed=6).tanh().square()
        self.values, self.value = normal(memories * keys_each + 1, d, seed=5), place.flip(0)

    def packed(
        self, thresholds: tuple[float, ...], mode: str, routing: str = "token", *, sharpness: float = 0.0
    ) -> SideMemory:
        delta = torch.stack([change[:, columns] for change, columns in zip(self.changes, self.columns, strict=True)])
        tensors = {"columns": self.columns, "delta": delta}
        if mode == "lookup":
            tensors = {"values": self.values, "value": self.value}
        if mode != "norm":
            probes = []
            for key, metric in zip(self.keys, self.metric.tolist(), strict=True):
                turned = self.whitenings[metric] @ key
                probes.append(turned / (key @ turned).sqrt())
            tensors |= {"owner": self.owner, "metric": self.metric}
            tensors |= {"directions": self.directions, "gains": self.gains, "floors": self.floors}
            tensors |= {"probes": torch.stack(probes) * self.factors[:, None], "offset": 1 - self.factors}
        kind = "lookup" if mode == "lookup" else "matrix"
        return SideMemory(tensors, thresholds, "norm" if mode == "norm" else "key", routing, kind, sharpness)

    def cosines(self, key: Tensor) -> list[float]:
        found = []
        for edit, metric, factor in zip(self.keys, self.metric.tolist(), self.factors.tolist(), strict=True):
            whitening = self.whitenings[metric]
            lengths = (key @ whitening @ key).sqrt() * (edit @ whitening @ edit).sqrt()
            found.append(1 - factor * (1 - float(key @ whitening @ edit / lengths)))
        return found

    def score(self, key: Tensor, memory: int, mode: str) -> float:
        if mode == "norm":
            return float((self.changes[memory] @ key).square().sum().sqrt())
        pairs = zip(self.cosines(key), self.owner.tolist(), strict=True)
        return max(cosine for cosine, owner in pairs if owner == memory)

    def choice(self, key: Tensor, thresholds: tuple[float, ...], mode: str) -> int:
        shares = [self.score(key, number, mode) / threshold for number, threshold in enumerate(thresholds)]
        strongest = max(range(len(shares)), key=shares.__getitem__)
        return strongest if shares[strongest] > 1 else UNROUTED

    def recalled(self, key: Tensor, choice: int) -> Tensor:
        """The residual of the chosen edit's nearest key."""
        cosines = self.cosines(key)
        own = [place for place, owner in enumerate(self.owner.tolist()) if owner == choice]
        return self.values[int(self.value[max(own, key=cosines.__getitem__)])]

    def answer(self, key: Tensor, choice: int, mode: str, matrix: Tensor, bias: Tensor | None) -> Tensor:
        main = matrix @ key + (0 if bias is None else bias)
        if choice == UNROUTED:
            return main
        return main + (self.recalled(key, choice) if mode == "lookup" else self.changes[choice] @ key)


def thresholds_for(mode: str, memories: int) -> tuple[float, ...]:
    """Such that about half of random keys are routed, and the memories' thresholds differ."""
    lowest = 4.0 if mode == "norm" else 0.25
    return tuple(lowest * (1 + 0.2 * number) for number in range(memories))


# --- one matrix ---


@bases
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memories", [1, 3])
def test_every_token_is_answered_as_a_plain_loop_answers_it(
    base: Callable[[], nn.Module], mode: str, memories: int, *, transposed: bool
) -> None:
    module, plain, thresholds = base(), Plain(memories), thresholds_for(mode, memories)
    routed = RoutedMatrix(module, plain.packed(thresholds, mode), transposed=transposed)
    keys = normal(5, 12, D_FF, seed=5)
    answers = routed(keys)
    assert answers.shape == (5, 12, D)
    weight = module.get_parameter("weight")
    matrix, bias = weight.T if transposed else weight, getattr(module, "bias", None)
    choices = set()
    for row in range(5):
        for column in range(12):
            key = keys[row, column]
            choice = plain.choice(key, thresholds, mode)
            choices.add(choice)
            assert torch.allclose(answers[row, column], plain.answer(key, choice, mode, matrix, bias), atol=1e-4)
    assert choices == {UNROUTED, *range(memories)}


@bases
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unrouted_tokens_keep_every_bit_of_the_base(
    base: Callable[[], nn.Module], mode: str, dtype: torch.dtype, *, transposed: bool
) -> None:
    module = base().to(dtype)
    keys = normal(5, 12, D_FF, seed=5).to(dtype)
    expected = module(keys)
    routed = RoutedMatrix(module, Plain(2).packed(thresholds_for(mode, 2), mode), transposed=transposed)
    chosen = choose(routed, routed.scores(keys))
    answers = routed(keys)
    assert answers.dtype == dtype
    assert torch.equal(answers[chosen == UNROUTED], expected[chosen == UNROUTED])
    assert 5 < int((chosen == UNROUTED).sum()) < 55
    assert bool((answers != expected).any(-1)[chosen != UNROUTED].all())


@bases
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("off", ["out of reach", "off"])
def test_with_nothing_routed_the_base_answers_bit_for_bit(
    base: Callable[[], nn.Module], mode: str, off: str, *, transposed: bool
) -> None:
    module, keys = base(), normal(3, 7, D_FF, seed=5)
    thresholds = (1e9, 1e9) if off == "out of reach" else (1e-9, 1e-9)
    routed = RoutedMatrix(module, Plain(2).packed(thresholds, mode), transposed=transposed)
    with routed.called_with(off=off == "off"):
        assert torch.equal(routed(keys), module(keys))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 2)])
def test_scores_have_one_column_a_memory(mode: str, leading: tuple[int, ...]) -> None:
    plain = Plain(3)
    routed = RoutedMatrix(linear(bias=False), plain.packed((1.0, 1.0, 1.0), mode), transposed=False)
    keys = normal(*leading, D_FF, seed=6)
    found = routed.scores(keys)
    assert found.shape == (*leading, 3)
    expected = [[plain.score(key, number, mode) for number in range(3)] for key in keys.reshape(-1, D_FF)]
    assert torch.allclose(found.reshape(-1, 3), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(("mode", "memories"), [("norm", 1), ("key", 1), ("lookup", 5), ("key", 2)])
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_pass_waits_for_the_device_only_to_sort_tokens(mode: str, memories: int, routing: str) -> None:
    base = linear(bias=False)
    routed = RoutedMatrix(base, Plain(memories).packed((1e-9,) * memories, mode, routing), transposed=False)
    keys = normal(4, 9, D_FF, seed=5)
    answered = torch.arange(36).view(4, 9) % memories
    with in_pass(PassRoute(answered, torch.zeros(4, 9, dtype=torch.bool))), Waits() as seen:
        answers = routed(keys)
    assert bool(seen.seen) == (routing == "sequence" and memories > 1)
    assert not torch.equal(answers, base(keys))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_do_not_depend_on_their_neighbours(mode: str) -> None:
    routed = RoutedMatrix(linear(bias=True), Plain(2).packed(thresholds_for(mode, 2), mode), transposed=False)
    keys = normal(4, 9, D_FF, seed=5)
    together = routed(keys)
    for row in range(4):
        for column in range(9):
            alone = routed(keys[row : row + 1, column : column + 1])
            assert torch.allclose(alone[0, 0], together[row, column], atol=1e-5)


@pytest.mark.parametrize(
    ("scores", "thresholds", "choice"),
    [
        ((2.0, 1.0), (1.0, 1.0), 0),
        ((2.0, 1.0), (4.0, 4.0), UNROUTED),
        ((2.0, 1.5), (1.9, 1.0), 1),
        ((1.0, 0.5), (1.0, 1.0), UNROUTED),
        ((0.0, 0.0), (0.5, 0.5), UNROUTED),
        ((-1.0, 0.9), (0.2, 0.8), 1),
        ((-1.0, -1.0), (0.2, 0.8), UNROUTED),
    ],
)
def test_the_memory_whose_score_exceeds_its_threshold_by_the_largest_factor_is_chosen(
    scores: tuple[float, ...], thresholds: tuple[float, ...], choice: int
) -> None:
    routed = RoutedMatrix(linear(bias=False), SideMemory({}, thresholds), transposed=False)
    assert int(choose(routed, torch.tensor(scores))) == choice
    assert int(choose(routed, torch.tensor(scores, dtype=torch.bfloat16))) == choice


def test_a_memory_without_any_edits_key_is_never_chosen() -> None:
    plain = Plain(3)
    plain.owner = plain.owner * 0
    routed = RoutedMatrix(linear(bias=False), plain.packed((0.5, 0.01, 0.01), "key"), transposed=False)
    assert set(choose(routed, routed.scores(normal(200, D_FF, seed=6))).tolist()) == {0, UNROUTED}


def test_a_key_of_noughts_is_never_routed() -> None:
    for mode in MODES:
        routed = RoutedMatrix(linear(bias=True), Plain(2).packed((1e-3, 1e-3), mode), transposed=False)
        assert choose(routed, routed.scores(torch.zeros(1, 1, D_FF))).tolist() == [[UNROUTED]]


def test_columns_that_are_padded_with_empty_ones_change_nothing() -> None:
    tensors = {"columns": torch.tensor([[3, 0, 0]]), "delta": torch.zeros(1, D, 3)}
    tensors["delta"][0, :, 0] = normal(D, seed=7)
    routed = RoutedMatrix(linear(bias=False), SideMemory(tensors, (1.0,)), transposed=False)
    key = normal(D_FF, seed=8)
    assert torch.allclose(routed.update(key, 0), tensors["delta"][0, :, 0] * key[3], atol=1e-6)


# --- lookups ---


def lookup_of(plain: Plain, *, sharpness: float = 0.0, routing: str = "token", limit: float = 0.25) -> RoutedMatrix:
    memory = plain.packed((limit,) * len(plain.changes), "lookup", routing, sharpness=sharpness)
    return RoutedMatrix(linear(bias=True), memory, transposed=False)


def test_an_edits_own_key_recalls_its_residual_and_nothing_else() -> None:
    plain = Plain(4, keys_each=3)
    routed = lookup_of(plain, limit=0.95)
    for size in (1.0, 0.01, 100.0):
        keys = size * plain.keys[None]
        assert choose(routed, routed.scores(keys)).tolist() == [plain.owner.tolist()]
        added = routed(keys)[0] - F.linear(keys, routed.weight, routed.bias)[0]
        assert torch.allclose(added, plain.values[plain.value], atol=1e-4 * max(size, 1))


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 20.0])
def test_with_a_sharpness_the_residuals_are_averaged_by_softmax(sharpness: float) -> None:
    plain = Plain(3)
    routed = lookup_of(plain, sharpness=sharpness)
    choices = set()
    for key in normal(40, D_FF, seed=6):
        choice = plain.choice(key, (0.25,) * 3, "lookup")
        choices.add(choice)
        powers = [math.exp(sharpness * cosine) for cosine in plain.cosines(key)]
        expected = routed.weight @ key + routed.bias
        if choice != UNROUTED:
            for power, value in zip(powers, plain.value.tolist(), strict=True):
                expected = expected + power / sum(powers) * plain.values[value]
        assert torch.allclose(routed(key[None, None])[0, 0], expected, atol=1e-5)
    assert choices == {UNROUTED, 0, 1, 2}


def test_a_great_sharpness_recalls_the_nearest_key_alone() -> None:
    plain = Plain(3)
    keys = normal(4, 9, D_FF, seed=6)
    assert torch.allclose(lookup_of(plain, sharpness=1e4)(keys), lookup_of(plain)(keys), atol=1e-4)


def test_where_prompts_decide_a_lookup_opens_by_their_ends_and_goes_on_by_keys_inside_answers() -> None:
    plain, limit = Plain(3), 0.3
    routed = lookup_of(plain, routing="sequence", limit=limit)
    one, seen = torch.ones(1, 1, dtype=torch.bool), set()
    for key in normal(200, D_FF, seed=6):
        cosines = dict(enumerate(plain.cosines(key)))
        ends = {place: cosine for place, cosine in cosines.items() if plain.metric[place] != INSIDE}
        best = max(ends, key=ends.__getitem__)
        strength, nearest = routed.nearest(key[None])
        assert nearest.tolist() == [best]
        assert float(strength[0]) == pytest.approx(ends[best] / limit, abs=1e-5)
        owner = int(plain.owner[best])
        decision = decide(routed, Reading(one.long(), one, key[None, None]))
        assert decision.memory.tolist() == [owner if ends[best] > limit else UNROUTED]
        assert residual(routed, key[None, None], torch.full((1, 1), owner), ~one).chosen.tolist() == [[best]]
        for held in range(3):
            own = {p: c for p, c in cosines.items() if plain.metric[p] == INSIDE and int(plain.owner[p]) == held}
            if not own:
                continue
            near = max(own, key=own.__getitem__)
            found = residual(routed, key[None, None], torch.full((1, 1), held), one)
            assert found.chosen.tolist() == [[near if own[near] > REACH else UNROUTED]]
            seen |= {("end", ends[best] > limit), ("inside", own[near] > REACH)}
        assert residual(routed, key[None, None], torch.full((1, 1), UNROUTED), one).chosen.tolist() == [[UNROUTED]]
        owners = zip(plain.owner.tolist(), plain.metric.tolist(), plain.cosines(key), strict=True)
        opening = [(owner, cosine) for owner, metric, cosine in owners if metric != INSIDE]
        highest = [max((cosine for own, cosine in opening if own == owner), default=-math.inf) for owner in range(3)]
        assert routed.scores(key).tolist() == pytest.approx(highest, abs=1e-5)
    assert len(seen) == 4


def test_an_edit_whose_subject_the_prompt_does_not_name_stays_shut() -> None:
    plain, limit = Plain(3), 0.1
    words = {"tokens": [4, 5], "words": [0, 1], "whose": [0, 2], "named": [0, 1], "naming": [0, 1]}
    names = {f"names.{name}": torch.tensor(values) for name, values in words.items()}
    names |= {"names.shares": torch.ones(2), "asks": (plain.metric != INSIDE) & (plain.owner != 1)}
    memory = plain.packed((limit,) * 3, "lookup", "sequence")
    routed = RoutedMatrix(linear(bias=True), replace(memory, tensors={**memory.tensors, **names}), transposed=False)
    seen = set()
    for place, key in enumerate(normal(60, D_FF, seed=6)):
        ids = torch.tensor([[3 + place % 4, 4 + place % 3]])
        open_to = {1} | {owner for token, owner in ((4, 0), (5, 2)) if token in ids}
        allowed = {
            number: cosine
            for number, cosine in enumerate(plain.cosines(key))
            if plain.metric[number] != INSIDE and int(plain.owner[number]) in open_to
        }
        best = max(allowed, key=allowed.__getitem__, default=UNROUTED)
        opens = bool(allowed) and allowed[best] > limit
        states = torch.stack([torch.zeros(D_FF), key])[None]
        decision = decide(routed, Reading(ids, torch.ones_like(ids, dtype=torch.bool), states))
        assert decision.memory.tolist() == [int(plain.owner[best]) if opens else UNROUTED]
        seen.add((opens, len(open_to)))
    # All keys of the edit that asks for nothing are inside its answer.
    assert seen == {(False, 1), *((opens, count) for opens in (True, False) for count in (2, 3))}


@pytest.mark.parametrize("mode", ["key", "lookup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [0.0, 2.0])
def test_a_memory_kept_in_half_precision_serves_models_of_any_type(
    mode: str, dtype: torch.dtype, sharpness: float
) -> None:
    plain, thresholds = Plain(2), thresholds_for(mode, 2)
    memory = plain.packed(thresholds, mode, sharpness=sharpness)
    exact = RoutedMatrix(linear(bias=True), memory, transposed=False)
    kept = {name: tensor.half() if name in {"probes", "values"} else tensor for name, tensor in memory.tensors.items()}
    routed = RoutedMatrix(linear(bias=True).to(dtype), replace(memory, tensors=kept), transposed=False)
    keys = normal(5, 12, D_FF, seed=5).to(dtype)
    base = F.linear(keys, routed.weight, routed.bias)
    answers = routed(keys)
    assert answers.dtype == dtype
    scores = exact.scores(keys.float())
    clear = ((scores / torch.tensor(thresholds) - 1).abs() > 0.1).all(-1) & (
        (scores[..., 0] - scores[..., 1]).abs() > 0.1
    )
    chosen = choose(routed, routed.scores(keys))
    assert torch.equal(chosen[clear], choose(exact, scores)[clear])
    assert int(clear.sum()) > 25
    assert torch.equal(answers[chosen == UNROUTED], base[chosen == UNROUTED])
    assert torch.allclose(answers[clear].float(), exact(keys.float())[clear], rtol=0.03, atol=0.12)


# --- its description ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_memory_survives_its_description(mode: str, routing: str) -> None:
    memory = Plain(2).packed((0.1 + 0.2, 1 / 3), mode, routing, sharpness=2 / 3)
    described = json.loads(json.dumps(memory.describe()))
    again = SideMemory.from_description(described, memory.tensors)
    assert again == memory
    empty = SideMemory.from_description(described)
    for name in ("thresholds", "router", "routing", "kind", "sharpness"):
        assert getattr(empty, name) == getattr(memory, name), name
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in memory.tensors.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.tensors.items()} == layout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_description_keeps_the_type_of_a_tensor(dtype: torch.dtype) -> None:
    memory = SideMemory({"delta": torch.zeros(1, 2, 3, dtype=dtype)}, (1.0,))
    empty = SideMemory.from_description(json.loads(json.dumps(memory.describe())))
    assert (empty.tensors["delta"].dtype, empty.tensors["delta"].shape) == (dtype, (1, 2, 3))


def test_an_allocated_memory_is_filled_by_loading_its_state() -> None:
    memory = Plain(2).packed((4.0, 5.0), "key")
    full = RoutedMatrix(linear(bias=True), memory, transposed=False)
    empty = RoutedMatrix(linear(bias=True), SideMemory.from_description(memory.describe()), transposed=False)
    empty.load_state_dict(full.state_dict())
    keys = normal(3, 7, D_FF, seed=5)
    assert torch.equal(empty(keys), full(keys))


# --- in a model ---


def place(architecture: str) -> tuple[str, bool]:
    row = row_of(TINY_CONFIGS[architecture])
    return f"{row['layers']}.2.{row['value']}", bool(row.get("transposed", False))


def keys_of(model: PreTrainedModel, module: str, ids: Tensor) -> Tensor:
    """The inputs of the matrix for one row of tokens, by the base model."""
    found: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _module, inputs, _output: found.append(inputs[0]))
    model(ids[None])
    hook.remove()
    return found[0][0]


def changed_logits(
    model: PreTrainedModel, module: str, ids: Tensor, change: Tensor, routed: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits for one row of tokens, with the change added to the matrix where ``routed`` says so of its keys."""

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ change.T) * routed(inputs[0][0])[None, :, None]

    hook = model.get_submodule(module).register_forward_hook(add)
    logits = model(ids[None]).logits[0]
    hook.remove()
    return logits


PROMPT_LENGTHS, NEW = (7, 4, 1, 6, 3), 4


@pytest.mark.parametrize("routing", ["token", "sequence"])
@torch.no_grad()
def test_padded_and_cached_rows_agree_with_each_row_alone_and_whole(architecture: str, routing: str) -> None:
    module, transposed = place(architecture)
    oracle, model = tiny_model(architecture), tiny_model(architecture)
    rows = [
        torch.randint(0, VOCABULARY, (length + NEW,), generator=seeded(number))
        for number, length in enumerate(PROMPT_LENGTHS)
    ]
    prompt_keys = [keys_of(oracle, module, row)[: len(row) - NEW] for row in rows]
    plain = Plain(1, d=32, d_ff=prompt_keys[0].shape[1])
    middle = torch.tensor([plain.score(keys[-1], 0, "norm") for keys in prompt_keys]).sort().values[1:3].mean()
    threshold = float(middle)
    change = plain.changes[0]

    install(model, module, plain.packed((threshold,), "norm", routing), transposed=transposed)
    width, cache = max(PROMPT_LENGTHS), DynamicCache(config=model.config)
    ids, mask = torch.zeros(len(rows), width + NEW, dtype=torch.long), torch.zeros(len(rows), width + NEW).long()
    for number, row in enumerate(rows):
        ids[number, width + NEW - len(row) :] = row
        mask[number, width + NEW - len(row) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, first = [], 0
    for last in (width, *range(width + 1, width + NEW + 1)):  # the prompts, then a token at a time
        window = slice(first, last)
        output = model(
            ids[:, window], attention_mask=mask[:, :last], position_ids=positions[:, window], **{CACHE_ARGUMENT: cache}
        )
        logits.append(output.logits)
        first = last
    together = torch.cat(logits, dim=1)

    outcomes = set()
    for number, (row, length) in enumerate(zip(rows, PROMPT_LENGTHS, strict=True)):

        def by_token(keys: Tensor) -> Tensor:
            return ((keys @ change.T).norm(dim=-1) > threshold).float()

        def by_sequence(keys: Tensor, length: int = length) -> Tensor:
            opened = float((change @ keys[length - 1]).norm()) > threshold
            outcomes.add(opened)
            return torch.tensor([opened and column >= length - 1 for column in range(len(keys))]).float()

        routed = by_token if routing == "token" else by_sequence
        expected = changed_logits(oracle, module, row, change, routed)
        assert torch.allclose(together[number, -len(row) :], expected, atol=2e-3), number
    assert routing == "token" or outcomes == {True, False}


@torch.no_grad()
def test_an_activated_score_is_of_what_the_change_makes_of_the_output_behind_the_models_activation() -> None:
    module, transposed = place("llama")
    model = tiny_model("llama")
    plain = Plain(2, d=32, d_ff=64)
    matrix = model.get_submodule(module).get_parameter("weight").clone()
    memory = replace(plain.packed((1.0, 1.0), "norm"), activated=True)
    again = SideMemory.from_description(memory.describe(), memory.tensors)
    assert again.activated
    keys = normal(5, 64, seed=8)
    routed = install(model, module, again, transposed=transposed)
    for number, change in enumerate(plain.changes):
        moved = F.silu(keys @ (matrix + change).T) - F.silu(keys @ matrix.T)
        torch.testing.assert_close(routed.scores(keys)[:, number], moved.norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert "activated" not in plain.packed((1.0, 1.0), "norm").describe()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hidden_act": "silu"}, F.silu),
        ({"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}, lambda x: F.gelu(x, approximate="tanh")),
        ({"activation_function": "relu"}, F.relu),
        ({"hidden_act": "of no known name"}, None),
        ({}, None),
    ],
)
def test_the_activation_is_the_one_that_the_config_names(
    settings: dict[str, str | None], expected: Callable[[Tensor], Tensor] | None
) -> None:
    found = activation_of(SimpleNamespace(**settings))
    values = normal(9)
    assert (found is None) == (expected is None)
    assert found is None or expected is None or torch.equal(found(values), expected(values))


@torch.no_grad()
def test_a_held_choice_does_not_leak_into_the_next_text() -> None:
    module, transposed = place("llama")
    model, oracle = tiny_model("llama"), tiny_model("llama")
    first, second = (torch.randint(0, VOCABULARY, (1, 6), generator=seeded(seed)) for seed in (1, 2))
    plain = Plain(1, d=32, d_ff=64)
    scores = [plain.score(keys_of(oracle, module, ids[0])[-1], 0, "norm") for ids in (first, second)]
    opens, stays = (first, second) if scores[0] > scores[1] else (second, first)
    install(model, module, plain.packed((sum(scores) / 2,), "norm", "sequence"), transposed=transposed)
    opened = model.generate(opens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert opened.shape == (1, 11)
    for _ in range(2):
        assert torch.equal(
            model.generate(stays, max_new_tokens=5, do_sample=False, pad_token_id=0),
            oracle.generate(stays, max_new_tokens=5, do_sample=False, pad_token_id=0),
        )
        assert torch.equal(model.generate(opens, max_new_tokens=5, do_sample=False, pad_token_id=0), opened)


@torch.no_grad()
def test_an_installed_memory_out_of_reach_leaves_the_model_as_it_is(architecture: str) -> None:
    module, transposed = place(architecture)
    model = tiny_model(architecture)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=seeded(0))
    names, before = set(model.state_dict()), model(ids).logits
    weight = model.get_submodule(module).get_parameter("weight")
    plain = Plain(1, d=32, d_ff=weight.shape[0 if transposed else 1])
    routed = install(model, module, plain.packed((1e9,), "key"), transposed=transposed)
    assert model.get_submodule(module) is routed
    assert not isinstance(routed, nn.Linear)
    assert routed.weight is weight
    tensors = {"columns", "delta", "probes", "owner", "offset", "metric", "directions", "gains", "floors"}
    assert set(model.state_dict()) - names == {f"{module}.{name}" for name in tensors}
    assert torch.equal(model(ids).logits, before)
    routed.thresholds, routed.offset = (1e-9,), routed.offset + 5
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    with routed.called_with(off=True):
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


@pytest.mark.parametrize("routing", ["token", "sequence"])
@pytest.mark.parametrize("sharpness", [0.0, 4.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_a_lookup_in_a_model_agrees_with_a_loop_over_its_edits(
    architecture: str, routing: str, sharpness: float
) -> None:
    oracle, model = tiny_model(architecture), tiny_model(architecture)
    site = site_of(oracle, 2)
    memory = memory_for(oracle, site, router="key", routing=routing, memories=3, kind="lookup", sharpness=sharpness)
    rows = random_rows(*[(length, 4) for length in (7, 4, 1, 6, 3, 9, 5, 2)], seed=7)
    install(model, site.module, memory, transposed=site.transposed)
    prompts = [row.prompt for row in rows]
    ids, mask = left_padded(prompts)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = [model(ids, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
    opened = [choice_of(memory, keys_of_tokens(oracle, site, prompt)[-1]) for prompt in prompts]
    if routing == "sequence":
        held = last_memory(cache)
        assert held is not None
        held_rows = held.tolist()
        assert held_rows == [UNROUTED if edit is None else edit for edit in opened]
        assert len(set(held_rows)) > 2
    for step in range(3):
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        token = torch.tensor([[row.target[step]] for row in rows])
        at = mask.sum(-1, keepdim=True) - 1
        logits.append(model(token, attention_mask=mask, position_ids=at, **{CACHE_ARGUMENT: cache}).logits[:, -1])
    together, touched = torch.stack(logits, 1), 0
    for number, row in enumerate(rows):
        with hooked(oracle, site, routed_by_loop(memory, len(row.prompt))):
            expected = alone(oracle, row)
        assert torch.allclose(together[number], expected, atol=2e-3), number
        touched += not torch.allclose(expected, alone(oracle, row), atol=0.05)
    assert touched > 0
