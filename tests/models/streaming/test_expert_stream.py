"""Experts that are read one by one give what a layer gives that holds them all, and few of them are ever there."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import save_type
from support.helpers import random_rows
from support.loading import CPU
from support.thorough import few
from torch import Tensor, nn

from wisecli.config import LoadOptions
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import ROWS
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.layout.site import LayerSite
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import collate
from wisecli.models.running.activations import captured
from wisecli.models.running.generation import generate
from wisecli.models.streaming.expert_stream import Entries, ExpertWeights, Room
from wisecli.models.streaming.layer_stream import LayerStream

BATCHES = [
    collate(random_rows((1, 2), (4, 1), (11, 3), (7, 6))),
    collate(random_rows((3, 2), (9, 1), seed=2)),
    collate(random_rows((6, 3), (6, 3), seed=3)),
]
# Stored one by one under names of several kinds, and joined; stored as they run, with biases; those that are sent all
# tokens; and those beside dense layers.
TYPES = (
    *("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "olmoe", "granitemoe_swa"),
    *("nemotron_h", "minimax_m2", "glm4_moe", "aria_text", "jamba", "inkling2_text"),
)
FEW = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text")
CASES = few([(kind, "5GB") for kind in TYPES] + [("mixtral", "40KB")], [(kind, "5GB") for kind in FEW])


def streamed(directory: Path, budget: int = 1) -> tuple[Loaded, LayerStream]:
    layout = find_layout(directory, Checkpoint(directory), lookup=True)
    loaded = load_model(directory, LoadOptions(device="cpu", memory_budget=budget), layers=layout.layers)
    assert loaded.stream is not None
    return loaded, loaded.stream


def logits_and_gradient(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """What the whole model gives of a row of states, and how that depends on them."""
    ids = BATCHES[0].ids[:1]
    states = loaded.model.get_input_embeddings()(ids).detach().requires_grad_()
    logits: Tensor = loaded.model(inputs_embeds=states, use_cache=False).logits
    logits.square().sum().backward()
    assert states.grad is not None
    return logits.detach(), states.grad


@pytest.mark.parametrize(("model_type", "shard"), CASES)
def test_answers_and_gradients_are_those_of_all_experts_in_memory(tmp_path: Path, model_type: str, shard: str) -> None:
    directory = save_type(tmp_path / "model", model_type)
    if shard != "5GB":
        model = load_model(directory, load=CPU).model
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, max_shard_size=shard)
        assert len(list(directory.glob("*.safetensors"))) > 3
    whole, (loaded, stream) = load_model(directory, load=CPU), streamed(directory)
    with torch.no_grad():
        found, expected = (one.model(input_ids=BATCHES[0].ids).logits for one in (loaded, whole))
    assert torch.equal(found, expected)
    answers = [generate(one.model, one.tokenizer, ["ba be"], max_new_tokens=4) for one in (loaded, whole)]
    assert answers[0] == answers[1]
    stream.hold(range(len(stream.layers)))
    for own, other in zip(logits_and_gradient(loaded), logits_and_gradient(whole), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("way", ["eager", "batched_mm"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_however_a_layer_goes_over_its_experts_they_give_the_same(tmp_path: Path, model_type: str, way: str) -> None:
    whole = load_model(save_type(tmp_path, model_type), load=CPU)
    loaded, stream = streamed(tmp_path)
    stream.hold(range(len(stream.layers)))
    for one in (loaded, whole):
        one.model.set_experts_implementation(way)
    for own, other in zip(logits_and_gradient(loaded), logits_and_gradient(whole), strict=True):
        assert torch.equal(own, other)


def test_only_experts_that_tokens_are_sent_to_are_read(tmp_path: Path) -> None:
    whole = load_model(save_type(tmp_path, "qwen3_moe", num_experts=16), load=CPU)
    loaded, stream = streamed(tmp_path)
    chosen: list[int] = []
    for layer in whole.model.get_submodule("model.layers").children():
        layer.mlp.experts.register_forward_pre_hook(lambda _, given: chosen.append(len(given[1].unique())))
    ids = BATCHES[0].ids[:1, :3]
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    expert = sum(one.bytes // 16 for one in stream._experts[0].values())
    dense = sum(sum(part.bytes for part in stored) for stored in stream._stored)
    stream.release()
    before = stream.bytes_read
    with torch.no_grad():
        loaded.model(input_ids=ids)
    stream.release()
    ahead = sum(part.bytes for part in stream._stored[0])  # the next pass' first layer is read while the last one runs
    assert max(chosen) < 16
    assert stream.bytes_read - before == dense + ahead + sum(chosen) * expert


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes there are of the experts that were made, at every one."""
    there: list[weakref.ref[torch.UntypedStorage]] = []
    noted: list[int] = []
    made = Entries.__init__

    def counted(self: Entries, parameter: Tensor, read: Callable[[int], Tensor], room: Room) -> None:
        def noting(number: int) -> Tensor:
            found = read(number)
            there.append(weakref.ref(found.untyped_storage()))
            noted.append(sum(one.nbytes() for ref in there if (one := ref()) is not None))
            return found

        made(self, parameter, noting, room)

    monkeypatch.setattr(Entries, "__init__", counted)
    return noted


@pytest.mark.parametrize("experts", [4, 32])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_as_many_bytes_are_held_as_one_expert_has_however_many_there_are(
    tmp_path: Path, model_type: str, experts: int, alive: list[int]
) -> None:
    name = "num_experts" if model_type == "qwen3_moe" else "num_local_experts"
    loaded, stream = streamed(save_type(tmp_path, model_type, **{name: experts}))
    one = sum(found.bytes // experts for found in stream._experts[1].values())
    with torch.no_grad():
        loaded.model(input_ids=BATCHES[0].ids)
    stream.hold(range(len(stream.layers)))
    logits_and_gradient(loaded)
    assert len(alive) > 10 * experts
    assert 0 < max(alive) <= one


def site_above(stream: LayerStream, width: int) -> LayerSite:
    return LayerSite("qwen3_moe", 2, "model.layers.2", width, ROWS)


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_sweep_reads_experts_once_where_there_is_room_and_else_once_a_batch(tmp_path: Path, room: int) -> None:
    loaded, stream = streamed(save_type(tmp_path, "qwen3_moe"))
    whole = load_model(tmp_path, load=CPU)
    stream._passing.size = {0: 0, 1: 3000, 10: 10**6}[room]
    before, site = stream.bytes_read, site_above(stream, 32)
    found = list(captured(loaded.model, site, BATCHES, stream=stream, above=False))
    for own, other in zip(found, captured(whole.model, site, BATCHES, above=False), strict=True):
        assert torch.equal(own.hidden, other.hidden)
    dense = sum(sum(part.bytes for part in stored) for stored in stream._stored[:3])
    experts = sum(one.bytes for found in stream._experts[:3] for one in found.values())
    read = stream.bytes_read - before - dense
    least, most = {0: (2 * experts, 3 * experts), 1: (experts + 1, 3 * experts - 1), 10: (1, experts)}[room]
    assert least <= read <= most


def test_held_layers_keep_the_experts_that_the_budget_has_room_for(tmp_path: Path) -> None:
    loaded, stream = streamed(save_type(tmp_path, "qwen3_moe"), budget=1000)
    assert (stream._passing.size, stream._staying.size) == (0, 0)
    stream.budget = 10**10
    stream.hold(range(3, 5))
    assert stream._staying.size > sum(one.bytes for found in stream._experts[3:] for one in found.values())
    expected = logits_and_gradient(load_model(tmp_path, load=CPU))
    stream.hold(range(5))
    found = logits_and_gradient(loaded)
    before = stream.bytes_read
    again = logits_and_gradient(loaded)
    assert stream.bytes_read == before
    for own, other, wanted in zip(found, again, expected, strict=True):
        assert torch.equal(own, wanted)
        assert torch.equal(other, wanted)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_nothing_is_written_of_experts_that_can_be_read_alone(tmp_path: Path, model_type: str) -> None:
    _, stream = streamed(save_type(tmp_path, model_type))
    assert stream.written is not None
    assert list(stream.written.iterdir()) == []
    assert all(parameter.is_meta for parameter in stream.layers.parameters())


# --- what stands for a parameter ---


@pytest.fixture
def weights() -> tuple[nn.Parameter, ExpertWeights, list[int]]:
    """A parameter, what stands for it, and which entries are read."""
    whole = nn.Parameter(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    read: list[int] = []

    def entry(number: int) -> Tensor:
        read.append(number)
        return whole[number].clone()

    return whole, ExpertWeights(Entries(whole, entry, Room()), torch.device("cpu")), read


TAKEN: dict[str, tuple[Callable[[Any], Tensor], int]] = {
    "an entry": (lambda one: one[3], 1),
    "an entry by a tensor": (lambda one: one[torch.tensor(2)], 1),
    "an entry and its axis": (lambda one: one[torch.tensor([2])], 1),
    "several": (lambda one: one[torch.tensor([[1, 4], [4, 1]])], 2),
    "a part": (lambda one: one[1:3], 5),
    "chosen": (lambda one: one[torch.tensor([True, False, False, True, False])], 5),
    "turned": (lambda one: one.transpose(-2, -1)[3], 1),
    "turned back": (lambda one: one.transpose(1, 2).transpose(2, 1)[3], 1),
    "turned otherwise": (lambda one: one.transpose(0, 1)[2], 5),
    "viewed": (lambda one: one.view(15, 4), 5),
    "multiplied": (lambda one: torch.matmul(one, torch.ones(5, 4, 2)), 5),
    "added": (lambda one: torch.add(one, 1), 5),
    "all by all": (lambda one: torch.bmm(torch.ones(5, 2, 3), one), 5),
    "all by zeros": (lambda one: torch.bmm(torch.eye(5)[3].view(5, 1, 1).expand(5, 2, 3), one), 1),
}


@pytest.mark.parametrize("taken", TAKEN)
def test_what_stands_for_a_parameter_gives_what_that_gives(
    taken: str, weights: tuple[nn.Parameter, ExpertWeights, list[int]]
) -> None:
    whole, stands, read = weights
    ask, count = TAKEN[taken]
    with torch.no_grad():
        assert torch.equal(ask(stands), ask(whole))
    assert len(read) == count
    assert (stands.shape, stands.dtype, len(stands)) == (whole.shape, whole.dtype, 5)
    assert stands.transpose(1, 2).shape == (5, 4, 3)


@pytest.mark.parametrize("ends", [[2, 2, 5, 5, 7], [0, 0, 0, 0, 7], [7, 7, 7, 7, 7]])
def test_a_grouped_product_is_that_of_the_entries_which_rows_are_sent_to(ends: list[int]) -> None:
    whole = torch.randn(5, 8, 16)
    stands = ExpertWeights(Entries(whole, lambda number: whole[number].clone(), Room()), torch.device("cpu"))
    rows, offs = torch.randn(2, 7, 16, requires_grad=True), torch.tensor(ends, dtype=torch.int32)
    results = [
        torch.nn.functional.grouped_mm(given, one.transpose(-2, -1), offs=offs)
        for given, one in zip(rows, (whole, stands), strict=True)
    ]
    starts = [0, *ends]
    for given, result in zip(rows, results, strict=True):
        for number, (start, end) in enumerate(zip(starts, ends, strict=False)):
            assert torch.allclose(result[start:end], given[start:end] @ whole[number].T, atol=1e-5)


def test_rows_that_are_sent_to_no_expert_get_zeros() -> None:
    whole = torch.randn(2, 8, 16)
    stands = ExpertWeights(Entries(whole, lambda number: whole[number].clone(), Room()), torch.device("cpu"))
    for ends in ([0, 0], [1, 3]):
        offs = torch.tensor(ends, dtype=torch.int32)
        found = torch.nn.functional.grouped_mm(torch.ones(5, 16), stands.transpose(-2, -1), offs=offs)
        assert found.shape == (5, 8)
        assert not found[ends[-1] :].any()


def test_an_entry_stays_while_there_is_room_and_is_as_it_was() -> None:
    whole, room, read = torch.randn(4, 3, 5), Room(), []

    def entry(number: int) -> Tensor:
        read.append(number)
        return whole[number].clone()

    entries = Entries(whole, entry, room)
    room.size = 130  # two of 60 bytes, each at the start of a line of 64
    for number in (0, 1, 2, 3, 2, 1, 0):
        assert torch.equal(entries.entry(number), whole[number])
    assert read == [0, 1, 2, 3, 2]
    room.clear()
    assert torch.equal(entries.entry(0), whole[0])
    assert read == [0, 1, 2, 3, 2, 0]
