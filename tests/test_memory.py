from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wisecli.memory import UNROUTED, PromptGate, RoutedMatrix, SideMemory, install
from wisecli.site import architectures

D, D_FF, READ, RANK = 6, 10, 4, 3
ROUTERS = ("norm", "key")


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
    """What a memory is made of, before anything is packed: dense changes, edits' keys and the whitening matrix."""

    def __init__(self, memories: int, *, d: int = D, d_ff: int = D_FF, keys_each: int = 2) -> None:
        self.changes = torch.zeros(memories, d, d_ff)
        self.columns = torch.stack(
            [torch.randperm(d_ff, generator=seeded(m))[:READ].sort().values for m in range(memories)]
        )
        for number, columns in enumerate(self.columns):
            self.changes[number][:, columns] = normal(d, READ, seed=10 + number)
        self.directions = torch.linalg.qr(normal(d_ff, RANK, seed=3))[0].T
        self.gains, self.floor = torch.tensor([-0.6, -0.4, 1.5])[:RANK], 0.9
        self.whitening = self.floor * torch.eye(d_ff) + self.directions.T @ torch.diag(self.gains) @ self.directions
        self.keys = normal(memories * keys_each, d_ff, seed=4)
        self.owner = torch.arange(memories * keys_each) % memories

    def packed(self, thresholds: tuple[float, ...], router: str, routing: str = "token") -> SideMemory:
        delta = torch.stack([change[:, columns] for change, columns in zip(self.changes, self.columns, strict=True)])
        tensors = {"columns": self.columns, "delta": delta}
        if router == "key":
            lengths = torch.stack([key @ self.whitening @ key for key in self.keys]).sqrt()
            tensors["probes"] = self.keys @ self.whitening / lengths[:, None]
            tensors |= {"owner": self.owner, "directions": self.directions, "gains": self.gains}
        return SideMemory(tensors, thresholds, router, routing, self.floor)

    def score(self, key: Tensor, memory: int, router: str) -> float:
        if router == "norm":
            return float((self.changes[memory] @ key).square().sum().sqrt())
        cosines = []
        for edit, owner in zip(self.keys, self.owner.tolist(), strict=True):
            if owner == memory:
                lengths = (key @ self.whitening @ key).sqrt() * (edit @ self.whitening @ edit).sqrt()
                cosines.append(float(key @ self.whitening @ edit / lengths))
        return max(cosines)

    def choice(self, key: Tensor, thresholds: tuple[float, ...], router: str) -> int:
        shares = [self.score(key, number, router) / threshold for number, threshold in enumerate(thresholds)]
        strongest = max(range(len(shares)), key=shares.__getitem__)
        return strongest if shares[strongest] > 1 else UNROUTED

    def answer(self, key: Tensor, choice: int, matrix: Tensor, bias: Tensor | None) -> Tensor:
        whole = matrix if choice == UNROUTED else matrix + self.changes[choice]
        return whole @ key + (0 if bias is None else bias)


def thresholds_for(router: str, memories: int) -> tuple[float, ...]:
    """Such that about half of random keys are routed, and the memories' thresholds differ."""
    lowest = 4.0 if router == "norm" else 0.25
    return tuple(lowest * (1 + 0.2 * number) for number in range(memories))


# --- one matrix ---


@bases
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("memories", [1, 3])
def test_every_token_is_answered_as_a_plain_loop_answers_it(
    base: Callable[[], nn.Module], router: str, memories: int, *, transposed: bool
) -> None:
    module, plain, thresholds = base(), Plain(memories), thresholds_for(router, memories)
    routed = RoutedMatrix(module, plain.packed(thresholds, router), transposed=transposed)
    keys = normal(5, 12, D_FF, seed=5)
    answers = routed(keys)
    assert answers.shape == (5, 12, D)
    weight = module.get_parameter("weight")
    matrix, bias = weight.T if transposed else weight, getattr(module, "bias", None)
    choices = set()
    for row in range(5):
        for column in range(12):
            key = keys[row, column]
            choice = plain.choice(key, thresholds, router)
            choices.add(choice)
            assert torch.allclose(answers[row, column], plain.answer(key, choice, matrix, bias), atol=1e-4)
    assert choices == {UNROUTED, *range(memories)}


@bases
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unrouted_tokens_keep_every_bit_of_the_base(
    base: Callable[[], nn.Module], router: str, dtype: torch.dtype, *, transposed: bool
) -> None:
    module = base().to(dtype)
    keys = normal(5, 12, D_FF, seed=5).to(dtype)
    expected = module(keys)
    routed = RoutedMatrix(module, Plain(2).packed(thresholds_for(router, 2), router), transposed=transposed)
    chosen = routed.choose(routed.scores(keys))
    answers = routed(keys)
    assert answers.dtype == dtype
    assert torch.equal(answers[chosen == UNROUTED], expected[chosen == UNROUTED])
    assert 5 < int((chosen == UNROUTED).sum()) < 55
    assert bool((answers != expected).any(-1)[chosen != UNROUTED].all())


@bases
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("off", ["out of reach", "disabled"])
def test_with_nothing_routed_the_base_answers_bit_for_bit(
    base: Callable[[], nn.Module], router: str, off: str, *, transposed: bool
) -> None:
    module, keys = base(), normal(3, 7, D_FF, seed=5)
    thresholds = (1e9, 1e9) if off == "out of reach" else (1e-9, 1e-9)
    routed = RoutedMatrix(module, Plain(2).packed(thresholds, router), transposed=transposed)
    routed.enabled = off != "disabled"
    assert torch.equal(routed(keys), module(keys))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 2)])
def test_scores_have_one_column_a_memory(router: str, leading: tuple[int, ...]) -> None:
    plain = Plain(3)
    routed = RoutedMatrix(linear(bias=False), plain.packed((1.0, 1.0, 1.0), router), transposed=False)
    keys = normal(*leading, D_FF, seed=6)
    found = routed.scores(keys)
    assert found.shape == (*leading, 3)
    expected = [[plain.score(key, number, router) for number in range(3)] for key in keys.reshape(-1, D_FF)]
    assert torch.allclose(found.reshape(-1, 3), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_do_not_depend_on_their_neighbours(router: str) -> None:
    routed = RoutedMatrix(linear(bias=True), Plain(2).packed(thresholds_for(router, 2), router), transposed=False)
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
    assert int(routed.choose(torch.tensor(scores))) == choice
    assert int(routed.choose(torch.tensor(scores, dtype=torch.bfloat16))) == choice


def test_a_memory_without_any_edits_key_is_never_chosen() -> None:
    plain = Plain(3)
    plain.owner = plain.owner * 0
    routed = RoutedMatrix(linear(bias=False), plain.packed((0.5, 0.01, 0.01), "key"), transposed=False)
    assert set(routed.choose(routed.scores(normal(200, D_FF, seed=6))).tolist()) == {0, UNROUTED}


def test_a_key_of_noughts_is_never_routed() -> None:
    for router in ROUTERS:
        routed = RoutedMatrix(linear(bias=True), Plain(2).packed((1e-3, 1e-3), router), transposed=False)
        assert routed.choose(routed.scores(torch.zeros(1, 1, D_FF))).tolist() == [[UNROUTED]]


def test_columns_that_are_padded_with_empty_ones_change_nothing() -> None:
    tensors = {"columns": torch.tensor([[3, 0, 0]]), "delta": torch.zeros(1, D, 3)}
    tensors["delta"][0, :, 0] = normal(D, seed=7)
    routed = RoutedMatrix(linear(bias=False), SideMemory(tensors, (1.0,)), transposed=False)
    key = normal(D_FF, seed=8)
    assert torch.allclose(routed.update(key, 0), tensors["delta"][0, :, 0] * key[3], atol=1e-6)


# --- its description ---


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_memory_survives_its_description(router: str, routing: str) -> None:
    memory = Plain(2).packed((0.1 + 0.2, 1 / 3), router, routing)
    described = json.loads(json.dumps(memory.describe()))
    again = SideMemory.from_description(described, memory.tensors)
    assert again == memory
    empty = SideMemory.from_description(described)
    assert (empty.thresholds, empty.router, empty.routing, empty.floor) == (memory.thresholds, router, routing, 0.9)
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


# --- the gate ---


def held(gate: PromptGate, chosen: list[list[int]], mask: list[list[int]] | None, cache: Any = None) -> list[list[int]]:
    named = {"attention_mask": None if mask is None else torch.tensor(mask), "past_key_values": cache}
    gate.before_forward(nn.Identity(), (), named)
    return gate.hold(torch.tensor(chosen)).tolist()  # type: ignore[no-any-return]


def grow(cache: DynamicCache, rows: int, tokens: int) -> None:
    cache.update(torch.zeros(rows, 1, tokens, 2), torch.zeros(rows, 1, tokens, 2), 0)


N = UNROUTED


@pytest.mark.parametrize(
    ("chosen", "mask", "expected"),
    [
        ([[0, 1, 2]], None, [[N, N, 2]]),
        ([[0, 1, N]], None, [[N, N, N]]),
        ([[0, 1, 2], [N, N, 1]], [[1, 1, 1], [0, 1, 1]], [[N, N, 2], [N, N, 1]]),
        ([[0, 1, 2], [1, 0, N]], [[0, 0, 1], [1, 1, 1]], [[N, N, 2], [N, N, N]]),
        ([[0, 1, 2], [2, 1, 0]], [[1, 1, 0], [1, 0, 0]], [[N, 1, 1], [2, 2, 2]]),
        ([[1]], [[1]], [[1]]),
    ],
    ids=["no mask", "no mask, unrouted", "left padding", "left padding, unrouted", "right padding", "one token"],
)
def test_the_gate_decides_at_each_rows_last_prompt_token(
    chosen: list[list[int]], mask: list[list[int]] | None, expected: list[list[int]]
) -> None:
    assert held(PromptGate(), chosen, mask) == expected
    assert held(PromptGate(), chosen, mask, DynamicCache()) == expected


def test_the_gate_holds_its_choice_over_cached_steps() -> None:
    gate, cache = PromptGate(), DynamicCache()
    assert held(gate, [[0, 1, 2], [1, 1, N], [N, N, 0]], [[1, 1, 1], [0, 1, 1], [0, 0, 1]], cache) == [
        [N, N, 2],
        [N, N, N],
        [N, N, 0],
    ]
    grow(cache, 3, 3)
    step = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert held(gate, [[N], [1], [1]], step, cache) == [[2], [N], [0]]
    grow(cache, 3, 1)
    step = [[*row, 1, 1] for row in step]
    assert held(gate, [[0, 0], [0, 0], [N, N]], step, cache) == [[2, 2], [N, N], [0, 0]]


def test_the_gate_forgets_when_the_cache_is_emptied() -> None:
    gate, cache = PromptGate(), DynamicCache()
    assert held(gate, [[0, 1]], [[1, 1]], cache) == [[N, 1]]
    grow(cache, 1, 2)
    assert held(gate, [[0]], [[1, 1, 1]], cache) == [[1]]
    cache.crop(-2)
    assert cache.get_seq_length() == 0
    assert held(gate, [[2, 0]], [[1, 1]], cache) == [[N, 0]]


def test_the_gate_keeps_the_choices_of_several_caches_apart() -> None:
    gate, first, second = PromptGate(), DynamicCache(), DynamicCache()
    held(gate, [[0, 1]], [[1, 1]], first)
    grow(first, 1, 2)
    held(gate, [[1, 0], [0, N]], [[1, 1], [1, 1]], second)
    grow(second, 2, 2)
    assert held(gate, [[N]], [[1, 1, 1]], first) == [[1]]
    assert held(gate, [[N], [1]], [[1, 1, 1], [1, 1, 1]], second) == [[0], [N]]
    assert held(gate, [[1, 2]], [[1, 1]]) == [[N, 2]]


def test_the_gate_decides_anew_on_a_cache_that_was_filled_without_it() -> None:
    gate, cache = PromptGate(), DynamicCache()
    grow(cache, 2, 3)
    mask = [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert held(gate, [[0, 1], [1, N]], mask, cache) == [[N, 1], [N, N]]


# --- in a model ---


def place(architecture: str) -> tuple[str, bool]:
    row = architectures()[architecture]
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
    for last in (width, width + 1, width + NEW):  # the prompts, one token, then the rest at once
        window = slice(first, last)
        output = model(
            ids[:, window], attention_mask=mask[:, :last], position_ids=positions[:, window], past_key_values=cache
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
    tensors = {"columns", "delta", "probes", "owner", "directions", "gains"}
    assert set(model.state_dict()) - names == {f"{module}.{name}" for name in tensors}
    assert torch.equal(model(ids).logits, before)
    routed.thresholds = (1e-9,)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    routed.enabled = False
    assert torch.equal(model(ids).logits, before)
