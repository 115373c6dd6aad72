import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from reference.wise import nearest_key, residual, scores_of
from support.drawing import normal, seeded
from support.helpers import Waits, alone, choice_of, hooked, memory_for, random_rows, routed_by_loop, row_of, site_of
from support.tiny_models import TINY_CONFIGS, VOCABULARY, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.models.running.generation import left_padded
from wisecli.routing.deciding.decision import AnswerTokens
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.layers.layer_states import state_of, with_state
from wisecli.routing.layers.routed_layer import (
    RoutedMatrix,
    RoutedMatrixMemory,
    activation_of,
    install_as,
    memory_module,
)
from wisecli.routing.memories.fact_memory import ANSWER_WHITENING, FactMemory
from wisecli.routing.memories.matrix_memory import MatrixMemory
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.passes.routed_pass import PassRoute, in_pass
from wisecli.routing.passes.token_cache import last_memory

D, D_FF, READ, RANK = 6, 10, 4, 3
# Different tokens that an answer may have.
TOKENS = 3
KINDS = ("matrix", "lookup")


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

    In a lookup every memory is an edit.
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
        self.key_to_edit, self.whitening_index = place % memories, (place // memories) % 2
        self.factors = 1 + normal(memories * keys_each, seed=6).tanh().square()
        self.residuals, self.key_to_residual = normal(memories * keys_each + 1, d, seed=5), place.flip(0)
        self.key_to_place = self.whitening_index * (1 + place // memories // 2 % 2)
        self.key_to_token = place % TOKENS

    def packed(self, thresholds: tuple[float, ...], kind: str = "matrix", pooling: str = "last") -> SideMemory:
        if kind == "matrix":
            pairs = zip(self.changes, self.columns, strict=True)
            tensors = {"columns": self.columns, "delta": torch.stack([change[:, columns] for change, columns in pairs])}
            return SideMemory(tensors, thresholds, kind, pooling)
        probes = []
        for key, metric in zip(self.keys, self.whitening_index.tolist(), strict=True):
            turned = self.whitenings[metric] @ key
            probes.append(turned / (key @ turned).sqrt())
        tensors = {
            "residuals": self.residuals,
            "key_to_residual": self.key_to_residual,
            "key_to_edit": self.key_to_edit,
            "whitening_index": self.whitening_index,
            "key_to_token": self.key_to_token,
            "key_to_place": self.key_to_place,
        }
        tensors |= {"directions": self.directions, "gains": self.gains, "floors": self.floors}
        tensors |= {"whitened_keys": torch.stack(probes) * self.factors[:, None], "cosine_offset": 1 - self.factors}
        return SideMemory({**tensors, **self.meaning()}, thresholds, kind)

    def meaning(self) -> dict[str, Tensor]:
        """A prompt of one token for each edit, which nothing here asks."""
        every = torch.arange(len(self.changes))
        return {
            "late_interaction.proj_weight": normal(2, 3, D, seed=7),
            "late_interaction.proj_bias": torch.zeros(2, 3),
            "late_interaction.logit_scale": torch.ones(2),
            "late_interaction.logit_offset": torch.zeros(2),
            "late_interaction.prompt_token_embeddings": normal(2 * len(every), 3, seed=8),
            "late_interaction.token_to_prompt": torch.arange(2 * len(every)),
            "late_interaction.token_weights": torch.ones(2 * len(every)),
            "late_interaction.prompt_to_edit": every,
            "late_interaction.special_token_ids": torch.tensor([0]),
        }


def at_prompt_ends(answered: Tensor) -> AnswerTokens:
    """Tokens in the shape of what answers them, with all of which prompts end."""
    return AnswerTokens(torch.zeros_like(answered), torch.zeros_like(answered))


def answering(routed: RoutedMatrix, keys: Tensor, answered: Tensor, tokens: AnswerTokens | None = None) -> Tensor:
    """What a matrix gives in a pass whose tokens are answered so; by default all come where prompts end."""
    with in_pass(PassRoute(answered, tokens or at_prompt_ends(answered))):
        found: Tensor = routed(keys)
    return found


def routed_matrix(base: nn.Module, memory: SideMemory, *, transposed: bool = False) -> RoutedMatrix:
    """A matrix of no model with its memory."""
    holder = nn.ModuleList([nn.ModuleDict({"down": base})])
    return install_as(holder, {"module": "0.down", "transposed": transposed}, memory)


# --- one matrix ---


def drawn(memories: int, *shape: int, seed: int = 11) -> Tensor:
    """What answers random tokens: a memory each, or none."""
    return torch.randint(UNROUTED, memories, shape, generator=seeded(seed))


@bases
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memories", [1, 3])
def test_every_token_is_answered_as_a_plain_loop_answers_it(
    base: Callable[[], nn.Module], kind: str, memories: int, *, transposed: bool
) -> None:
    module, memory = base(), Plain(memories, keys_each=4).packed((1.0,) * memories, kind)
    routed = routed_matrix(base(), memory, transposed=transposed)
    keys, answered = normal(5, 12, D_FF, seed=5), drawn(memories, 5, 12)
    tokens = AnswerTokens(drawn(TOKENS, 5, 12, seed=13), drawn(3, 5, 12, seed=12))
    answers = answering(routed, keys, answered, tokens)
    assert answers.shape == (5, 12, D)
    for row in range(5):
        for column in range(12):
            key, edit = keys[row, column], int(answered[row, column])
            expected = module(key)
            if edit != UNROUTED:
                token, place = int(tokens.ids[row, column]), int(tokens.place[row, column])
                expected = expected + residual(memory, edit, key, place=place, token=token)
            assert torch.allclose(answers[row, column], expected, atol=1e-4)
    # A token's answer does not depend on its neighbours.
    for column in range(12):
        part = slice(column, column + 1)
        alone = answering(routed, keys[:, part], answered[:, part], tokens[:, part])
        assert torch.allclose(alone, answers[:, part], atol=1e-5)


@bases
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unrouted_tokens_keep_every_bit_of_the_base(
    base: Callable[[], nn.Module], kind: str, dtype: torch.dtype, *, transposed: bool
) -> None:
    keys, answered = normal(5, 12, D_FF, seed=5).to(dtype), drawn(2, 5, 12)
    expected = base().to(dtype)(keys)
    memory = Plain(2, keys_each=4).packed((1.0, 1.0), kind)
    routed = routed_matrix(base().to(dtype), memory, transposed=transposed)
    answers = answering(routed, keys, answered)
    assert answers.dtype == dtype
    assert torch.equal(answers[answered == UNROUTED], expected[answered == UNROUTED])
    assert 5 < int((answered == UNROUTED).sum()) < 55
    assert bool((answers != expected).any(-1)[answered != UNROUTED].all())


@bases
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", ["nothing answers", "off", "no pass"])
def test_with_nothing_routed_the_base_answers_bit_for_bit(
    base: Callable[[], nn.Module], kind: str, off: str, *, transposed: bool
) -> None:
    module, keys = base(), normal(3, 7, D_FF, seed=5)
    routed = routed_matrix(base(), Plain(2, keys_each=4).packed((1.0, 1.0), kind), transposed=transposed)
    answered = torch.full((3, 7), UNROUTED if off == "nothing answers" else 0)
    if off == "no pass":
        assert torch.equal(routed(keys), module(keys))
        return
    with routed.called_with(off=off == "off"):
        assert torch.equal(answering(routed, keys, answered), module(keys))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 2)])
def test_scores_have_one_column_a_memory(leading: tuple[int, ...]) -> None:
    memory = Plain(3).packed((1.0, 1.0, 1.0))
    routed = MatrixMemory(memory)
    keys = normal(*leading, D_FF, seed=6)
    found = routed.scores(keys)
    assert found.shape == (*leading, 3)
    expected = [scores_of(memory, (), key[None]) for key in keys.reshape(-1, D_FF)]
    assert torch.allclose(found.reshape(-1, 3), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(("kind", "memories"), [("matrix", 1), ("matrix", 3), ("lookup", 5)])
def test_a_pass_waits_for_the_device_only_to_sort_tokens(kind: str, memories: int) -> None:
    base = linear(bias=False)
    routed = routed_matrix(linear(bias=False), Plain(memories, keys_each=4).packed((1.0,) * memories, kind))
    keys = normal(4, 9, D_FF, seed=5)
    with Waits() as seen:
        answers = answering(routed, keys, torch.arange(36).view(4, 9) % memories)
    assert bool(seen.seen) == (memories > 1)
    assert not torch.equal(answers, base(keys))


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
    routed = MatrixMemory(SideMemory({}, thresholds))
    strength, nearest = routed.best_score_ratio(torch.tensor(scores))
    assert int(nearest.where(strength > 1, UNROUTED)) == choice
    strength, nearest = routed.best_score_ratio(torch.tensor(scores, dtype=torch.bfloat16))
    assert int(nearest.where(strength > 1, UNROUTED)) == choice


def test_columns_that_are_padded_with_empty_ones_change_nothing() -> None:
    tensors = {"columns": torch.tensor([[3, 0, 0]]), "delta": torch.zeros(1, D, 3)}
    tensors["delta"][0, :, 0] = normal(D, seed=7)
    routed = MatrixMemory(SideMemory(tensors, (1.0,)))
    key = normal(D_FF, seed=8)
    assert torch.allclose(routed.delta_output(key, 0), tensors["delta"][0, :, 0] * key[3], atol=1e-6)


# --- lookups ---


def test_an_edits_own_key_recalls_its_residual_and_nothing_else() -> None:
    plain = Plain(4, keys_each=3)
    plain.factors = torch.ones_like(plain.factors)
    routed = routed_matrix(linear(bias=True), plain.packed((1.0,) * 4, "lookup"))
    for size in (1.0, 0.01, 100.0):
        keys = size * plain.keys[None]
        inside = (plain.whitening_index == ANSWER_WHITENING).long()[None]
        answers = answering(
            routed, keys, plain.key_to_edit[None], AnswerTokens(torch.full_like(inside, TOKENS), inside)
        )
        added = answers[0] - F.linear(keys, routed.weight, routed.bias)[0]
        assert torch.allclose(added, plain.residuals[plain.key_to_residual], atol=1e-4 * max(size, 1))


def test_a_lookup_goes_on_by_keys_inside_its_answer_and_only_near_ones() -> None:
    plain, seen = Plain(3, keys_each=4), set()
    memory = plain.packed((1.0,) * 3, "lookup")
    lookup = FactMemory(memory)
    for key in normal(200, D_FF, seed=6):
        for edit, place, token in product(range(3), range(3), range(TOKENS + 1)):
            one = torch.full((1, 1), edit)
            found = lookup.choices(key[None, None], one, AnswerTokens(one * 0 + token, one * 0 + place))
            nearest = nearest_key(memory, edit, key, place=place, token=token)
            assert found.chosen.tolist() == [[UNROUTED if nearest is None else nearest]]
            assert found.chosen.tolist() == [[UNROUTED]] or lookup.memory_of_choice(found.chosen).tolist() == [[edit]]
            own = plain.key_to_edit == edit
            known = place > 0 and bool((own & (plain.key_to_token == token) & (plain.key_to_place == place)).any())
            seen.add((place > 0, known, int(found.chosen) == UNROUTED))
        nobody = torch.full((1, 1), UNROUTED)
        nothing = lookup.choices(key[None, None], nobody, AnswerTokens(nobody, torch.ones(1, 1).long()))
        assert nothing.chosen.tolist() == [[UNROUTED]]
    # At a prompt's end tokens say nothing; inside an answer one that an edit's own has there always goes on.
    assert seen == {(False, False, False), (True, True, False), (True, False, False), (True, False, True)}


def test_residuals_of_an_edit_are_what_it_adds_once_opened() -> None:
    plain, keys = Plain(3, keys_each=4), normal(20, D_FF, seed=6)
    for memory in (plain.packed((1.0,) * 3, kind) for kind in KINDS):
        for edit in range(3):
            expected, alone = torch.stack([residual(memory, edit, key) for key in keys]), memory_module(memory)
            answered = torch.full((1, 20), edit)
            chosen = alone.choices(keys[None], answered, at_prompt_ends(answered)).chosen
            found = alone.add(torch.zeros_like(expected)[None], keys[None], chosen)[0]
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_memory_kept_in_half_precision_serves_models_of_any_type(dtype: torch.dtype) -> None:
    memory = Plain(2, keys_each=4).packed((1.0, 1.0), "lookup")
    exact = routed_matrix(linear(bias=True), memory)
    kept = {
        name: tensor.half() if name in {"whitened_keys", "residuals"} else tensor
        for name, tensor in memory.tensors.items()
    }
    routed = routed_matrix(linear(bias=True).to(dtype), replace(memory, tensors=kept))
    keys, answered = normal(5, 12, D_FF, seed=5).to(dtype), drawn(2, 5, 12)
    none = at_prompt_ends(answered)
    base, answers = F.linear(keys, routed.weight, routed.bias), answering(routed, keys, answered)
    assert answers.dtype == dtype
    assert torch.equal(answers[answered == UNROUTED], base[answered == UNROUTED])
    same = routed.choices(keys, answered, none).chosen == exact.choices(keys.float(), answered, none).chosen
    assert float(same.float().mean()) > 0.9
    expected = answering(exact, keys.float(), answered)
    assert torch.allclose(answers[same].float(), expected[same], rtol=0.03, atol=0.12)


# --- its description ---


@pytest.mark.parametrize(("kind", "pooling"), [("matrix", "last"), ("matrix", "mean"), ("lookup", "last")])
def test_a_memory_survives_its_description(kind: str, pooling: str) -> None:
    memory = replace(Plain(2).packed((0.1 + 0.2, 1 / 3), kind, pooling), state_layer=3)
    described = json.loads(json.dumps(memory.describe()))
    again = SideMemory.from_description(described, memory.tensors)
    assert again == memory
    empty = SideMemory.from_description(described)
    for name in ("thresholds", "kind", "pooling", "state_layer"):
        assert getattr(empty, name) == getattr(memory, name), name
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in memory.tensors.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.tensors.items()} == layout


@pytest.mark.parametrize("changes", [{"router": "key"}, {"pooling": "token"}, {"kind": "x"}])
def test_a_memory_that_opens_as_there_is_no_more_is_refused(changes: dict[str, Any]) -> None:
    described = {**Plain(2).packed((1.0, 1.0), "lookup").describe(), **changes}
    with pytest.raises(ValueError, match=r"its edits open by router .*`wise merge` on its shards"):
        SideMemory.from_description(described)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_description_keeps_the_type_of_a_tensor(dtype: torch.dtype) -> None:
    memory = SideMemory({"delta": torch.zeros(1, 2, 3, dtype=dtype)}, (1.0,))
    empty = SideMemory.from_description(json.loads(json.dumps(memory.describe())))
    assert (empty.tensors["delta"].dtype, empty.tensors["delta"].shape) == (dtype, (1, 2, 3))


def test_an_allocated_memory_is_filled_by_loading_its_state() -> None:
    memory = Plain(2, keys_each=4).packed((4.0, 5.0), "lookup")
    full = routed_matrix(linear(bias=True), memory)
    empty = routed_matrix(linear(bias=True), SideMemory.from_description(memory.describe()))
    empty.load_state_dict(full.state_dict())
    keys, answered = normal(3, 7, D_FF, seed=5), drawn(2, 3, 7)
    assert torch.equal(answering(empty, keys, answered), answering(full, keys, answered))


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


@torch.no_grad()
def test_padded_and_cached_rows_agree_with_each_row_alone_and_whole(architecture: str) -> None:
    module, transposed = place(architecture)
    oracle, model = tiny_model(architecture), tiny_model(architecture)
    rows = [
        torch.randint(0, VOCABULARY, (length + NEW,), generator=seeded(number))
        for number, length in enumerate(PROMPT_LENGTHS)
    ]
    prompt_keys = [keys_of(oracle, module, row)[: len(row) - NEW] for row in rows]
    plain = Plain(1, d=32, d_ff=prompt_keys[0].shape[1])
    middle = (
        torch.tensor([scores_of(plain.packed((1.0,)), (), keys)[0] for keys in prompt_keys]).sort().values[1:3].mean()
    )
    threshold = float(middle)
    change = plain.changes[0]

    install_as(model, {"module": module, "transposed": transposed}, plain.packed((threshold,)))
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

        def by_sequence(keys: Tensor, length: int = length) -> Tensor:
            opened = float((change @ keys[length - 1]).norm()) > threshold
            outcomes.add(opened)
            return torch.tensor([opened and column >= length - 1 for column in range(len(keys))]).float()

        expected = changed_logits(oracle, module, row, change, by_sequence)
        assert torch.allclose(together[number, -len(row) :], expected, atol=2e-3), number
    assert outcomes == {True, False}


@torch.no_grad()
def test_an_activated_score_is_of_what_the_change_makes_of_the_output_behind_the_models_activation() -> None:
    module, transposed = place("llama")
    model = tiny_model("llama")
    plain = Plain(2, d=32, d_ff=64)
    matrix = model.get_submodule(module).get_parameter("weight").clone()
    memory = replace(plain.packed((1.0, 1.0)), activated=True)
    again = SideMemory.from_description(memory.describe(), memory.tensors)
    assert again.activated
    keys = normal(5, 64, seed=8)
    routed = install_as(model, {"module": module, "transposed": transposed}, again)
    assert isinstance(routed, RoutedMatrixMemory)
    for number, change in enumerate(plain.changes):
        moved = F.silu(keys @ (matrix + change).T) - F.silu(keys @ matrix.T)
        torch.testing.assert_close(routed.scores(keys)[:, number], moved.norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert "activated" not in plain.packed((1.0, 1.0)).describe()


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
    scores = [scores_of(plain.packed((1.0,)), (), keys_of(oracle, module, ids[0]))[0] for ids in (first, second)]
    opens, stays = (first, second) if scores[0] > scores[1] else (second, first)
    install_as(model, {"module": module, "transposed": transposed}, plain.packed((sum(scores) / 2,)))
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
    routed = install_as(model, {"module": module, "transposed": transposed}, plain.packed((1e9,)))
    assert model.get_submodule(module) is routed
    assert not isinstance(routed, nn.Linear)
    assert routed.weight is weight
    tensors = {"columns", "delta"}
    assert set(model.state_dict()) - names == {f"{module}.{name}" for name in tensors}
    assert torch.equal(model(ids).logits, before)
    routed.thresholds = (1e-9,)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    with routed.called_with(off=True):
        assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_a_lookup_in_a_model_agrees_with_a_loop_over_its_edits(architecture: str) -> None:
    oracle, model = tiny_model(architecture), tiny_model(architecture)
    site = site_of(oracle, 2)
    memory = memory_for(oracle, site, memories=3, kind="lookup")
    rows = random_rows(*[(length, 4) for length in (7, 4, 1, 6, 3, 9, 5, 2)], seed=7)
    site.install(model, memory)
    prompts = [row.prompt for row in rows]
    ids, mask = left_padded(prompts)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = [model(ids, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits[:, -1]]
    opened = [choice_of(oracle, site, memory, prompt) for prompt in prompts]
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
        with hooked(oracle, site, routed_by_loop(memory, len(row.prompt), opened[number], row.target)):
            expected = alone(oracle, row)
        assert torch.allclose(together[number], expected, atol=2e-3), number
        touched += not torch.allclose(expected, alone(oracle, row), atol=0.05)
    assert touched > 0


class Pair(NamedTuple):
    states: Tensor
    others: Tensor


@pytest.mark.parametrize("kind", [Pair._make, tuple, list])
def test_states_are_changed_in_whatever_a_layer_gives(kind: Callable[[Any], Any]) -> None:
    output = kind([normal(2, 3, D), normal(2, 3, D, seed=1)])
    changed = with_state(output, state_of(output, None) + 1, None)
    assert type(changed) is type(output)
    assert torch.equal(changed[0], output[0] + 1)
    assert changed[1] is output[1]
