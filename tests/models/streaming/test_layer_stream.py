"""A model whose layers are read as they run does what it does when it is held whole, bit for bit."""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_type import save_type
from support.helpers import random_rows, save_tiny, site_of
from support.loading import CPU
from support.places import EDITS
from support.streamed import assert_edited_the_same_streamed
from support.thorough import few
from support.tiny_models import TINY_CONFIGS, TYPICAL, VARIANTS, Chain
from torch import Tensor

from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.generate import Answer
from wisecli.commands.checkpoint.generate import generate as run_generate
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, EvalSettings, LoadOptions, MergeSettings
from wisecli.errors import ModelError
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.evaluation.teacher_forcing import teacher_forced
from wisecli.io.checkpoint import Checkpoint, save_tensors
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import Batch, collate, encode
from wisecli.models.running.activations import Activations, capture, captured
from wisecli.models.running.generation import generate
from wisecli.models.running.upper_layers import upper_logits
from wisecli.models.streaming.layer_stream import LayerStream
from wisecli.models.streaming.tensor_spill import Spool
from wisecli.progress import ignore_progress

BATCHES = [
    collate(random_rows((1, 2), (4, 1), (11, 3), (7, 6), (2, 5))),
    collate(random_rows((3, 2), (9, 1), seed=2)),
    collate(random_rows((6, 3), (6, 3), seed=3)),
]
PROMPTS = ["ba be bi bo", "da", "ka ke ki ko ku la le"]


def both(directory: Path, budget: int = 1) -> tuple[Loaded, Loaded]:
    whole, streamed = (
        load_model(directory, load=CPU),
        load_model(directory, load=LoadOptions(device="cpu", memory_budget=budget)),
    )
    assert whole.stream is None
    assert streamed.stream is not None
    return whole, streamed


FORMS = few([*sorted(TINY_CONFIGS), *sorted(VARIANTS)], [*TYPICAL, "llama, tied", "phi3", "qwen2_vl"])


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Loaded]:
    """Each architecture in each of its forms, held whole and streamed."""
    return both(save_tiny(tmp_path_factory.mktemp("streaming") / "model", str(request.param)))


def assert_same(found: Activations, expected: Activations) -> None:
    assert (found.first, found.tuple_width, found.multiplier) == (
        expected.first,
        expected.tuple_width,
        expected.multiplier,
    )
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.hidden, expected.hidden)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.past) == len(expected.past)
    for own, other in zip(found.past, expected.past, strict=True):
        assert torch.equal(own[0], other[0])
        assert torch.equal(own[1], other[1])
    assert (found.output is None) == (expected.output is None)
    if found.output is not None and expected.output is not None:
        assert torch.equal(found.output, expected.output)


@torch.no_grad()
def logits_of(loaded: Loaded, batch: Batch) -> Tensor:
    given = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
    logits: Tensor = loaded.model(**given).logits
    return logits


def test_the_whole_pass_gives_the_same_logits(pair: tuple[Loaded, Loaded]) -> None:
    whole, streamed = pair
    for batch in BATCHES:
        assert torch.equal(logits_of(streamed, batch), logits_of(whole, batch))


def test_the_same_answers_are_generated(pair: tuple[Loaded, Loaded]) -> None:
    whole, streamed = pair
    for sampling in (None, 3):
        found, expected = (
            generate(one.model, one.tokenizer, PROMPTS, max_new_tokens=6, sampling_seed=sampling)
            for one in (streamed, whole)
        )
        assert found == expected


@pytest.mark.parametrize(("layer", "window"), [(0, False), (2, True), (3, False)])
def test_a_sweep_captures_what_single_passes_do(pair: tuple[Loaded, Loaded], layer: int, window: bool) -> None:
    whole, streamed = pair
    site = site_of(whole.model, layer)
    found = captured(streamed.model, site, BATCHES, stream=streamed.stream, labelled=True, window=window)
    for activations, batch in zip(found, BATCHES, strict=True):
        expected = capture(whole.model, site, batch, select=batch.labelled)
        assert_same(activations, expected.from_window() if window else expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_on_lower_value_modules_see_the_batches_in_order(pair: tuple[Loaded, Loaded], layer: int) -> None:
    seen: list[list[Tensor]] = [[], []]
    for loaded, own in zip(pair, seen, strict=True):
        lower = site_of(loaded.model, layer).watched(loaded.model)
        handle = lower.register_forward_pre_hook(lambda _module, inputs, own=own: own.append(inputs[0].clone()))
        site = site_of(pair[0].model, 3)
        assert len(list(captured(loaded.model, site, BATCHES, stream=loaded.stream, above=False))) == len(BATCHES)
        handle.remove()
    assert len(seen[0]) == len(BATCHES)
    for own, other in zip(*seen, strict=True):
        assert torch.equal(own, other)


def test_layers_that_are_held_give_the_same_and_take_gradients(pair: tuple[Loaded, Loaded]) -> None:
    whole = pair[0]
    streamed = load_model(Path(whole.model.config._name_or_path), load=LoadOptions(device="cpu", memory_budget=1))
    assert streamed.stream is not None
    site = site_of(whole.model, 2)
    streamed.stream.hold(range(site.layer + 1, 5))
    assert streamed.stream.streamed == [0, 1, 2]
    gradients = []
    for loaded in (whole, streamed):
        (activations,) = captured(loaded.model, site, BATCHES[:1], stream=loaded.stream, window=True)
        hidden = activations.hidden.clone().requires_grad_()
        upper_logits(loaded.model, site, activations, hidden, activations.batch.labelled).square().sum().backward()
        gradients.append(hidden.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_a_layer_that_is_not_held_takes_no_gradient(tmp_path: Path) -> None:
    whole, streamed = both(save_tiny(tmp_path / "model"))
    site = site_of(whole.model, 2)
    activations = capture(whole.model, site, BATCHES[0])
    hidden = activations.hidden.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="layer 3 is streamed"):
        upper_logits(streamed.model, site, activations, hidden, BATCHES[0].labelled)


@pytest.mark.parametrize("variant", ["llama", "llama, tied", "gpt2", "phi3"])
def test_a_checkpoint_in_many_files_gives_the_same(tmp_path: Path, variant: str) -> None:
    directory = save_tiny(tmp_path / "model", variant, shard="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    whole, streamed = both(directory)
    assert torch.equal(logits_of(streamed, BATCHES[0]), logits_of(whole, BATCHES[0]))


@pytest.mark.parametrize(("variant", "dtype"), [("llama", "bfloat16"), ("gpt2", "float16"), ("gemma2", "bfloat16")])
def test_another_type_than_the_stored_one_gives_the_same(tmp_path: Path, variant: str, dtype: str) -> None:
    directory = save_tiny(tmp_path / "model", variant)
    whole = load_model(directory, load=LoadOptions(device="cpu", dtype=dtype))
    streamed = load_model(directory, load=LoadOptions(device="cpu", dtype=dtype, memory_budget=1))
    assert streamed.model.dtype == getattr(torch, dtype)
    assert torch.equal(logits_of(streamed, BATCHES[0]), logits_of(whole, BATCHES[0]))


def test_at_most_two_layers_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, streamed = both(save_tiny(tmp_path / "model"))
    stream = streamed.stream
    assert stream is not None
    buffers: list[weakref.ref[Tensor]] = []
    new_slot = stream._new_slot

    def counted(size: int) -> Any:
        slot = new_slot(size)
        buffers.append(weakref.ref(slot.host))
        return slot

    most: list[int] = []

    def count(*_: object) -> None:
        most.append(sum(ref() is not None for ref in buffers))
        filled = [layer for layer in stream.layers if not any(p.is_meta for p in layer.parameters())]
        assert len(filled) == 1

    monkeypatch.setattr(stream, "_new_slot", counted)
    handles = [site_of(streamed.model, n).watched(streamed.model).register_forward_hook(count) for n in range(5)]
    site = site_of(streamed.model, 3)
    for _ in range(2):
        logits_of(streamed, BATCHES[0])
        list(captured(streamed.model, site, BATCHES, stream=stream))
        generate(streamed.model, streamed.tokenizer, PROMPTS, max_new_tokens=3)
    for handle in handles:
        handle.remove()
    assert max(most) == 2
    stream.release()
    gc.collect()
    assert not any(ref() is not None for ref in buffers)
    assert all(parameter.is_meta for parameter in stream.layers.parameters())


def test_a_sweep_reads_each_layer_once(tmp_path: Path) -> None:
    _, streamed = both(save_tiny(tmp_path / "model"))
    stream = streamed.stream
    assert stream is not None
    site = site_of(streamed.model, 2)
    before = stream.bytes_read
    list(captured(streamed.model, site, BATCHES, stream=stream, above=False))
    assert stream.bytes_read - before == sum(sum(part.bytes for part in stream._stored[n]) for n in range(3))


def test_parameters_lie_in_lines_of_64_bytes(tmp_path: Path) -> None:
    _, streamed = both(save_tiny(tmp_path / "model", "gpt_neox"))
    assert streamed.stream is not None
    with streamed.stream.filled(1):
        assert all(parameter.data_ptr() % 64 == 0 for parameter in streamed.stream.layers[1].parameters())


def test_what_exceeds_the_spool_goes_to_the_disk_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, streamed = both(save_tiny(tmp_path / "model", "gemma2"), budget=1000)
    assert streamed.stream is not None
    assert streamed.stream.spool_bytes == 125
    written: list[int] = []
    close = Spool.close

    def noted(self: Spool) -> None:
        written.append(self.written)
        close(self)

    monkeypatch.setattr(Spool, "close", noted)
    site = site_of(whole.model, 2)
    found = captured(streamed.model, site, BATCHES, stream=streamed.stream, labelled=True)
    for activations, batch in zip(found, BATCHES, strict=True):
        assert_same(activations, capture(whole.model, site, batch, select=batch.labelled))
    assert written[0] > 10_000


def test_an_exception_leaves_the_layers_empty_and_streamed(tmp_path: Path) -> None:
    whole, streamed = both(save_tiny(tmp_path / "model"))
    stream = streamed.stream
    assert stream is not None

    def fail(*_: object) -> None:
        raise RuntimeError("power cut")

    handle = site_of(streamed.model, 1).watched(streamed.model).register_forward_hook(fail)
    for run in (
        lambda: logits_of(streamed, BATCHES[0]),
        lambda: list(captured(streamed.model, site_of(streamed.model, 2), BATCHES, stream=stream)),
    ):
        with pytest.raises(RuntimeError, match="power cut"):
            run()
        assert all(parameter.is_meta for parameter in stream.layers.parameters())
    handle.remove()
    assert torch.equal(logits_of(streamed, BATCHES[0]), logits_of(whole, BATCHES[0]))


def test_a_model_that_fits_is_held_whole(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    assert load_model(directory, load=LoadOptions(device="cpu", memory_budget=10**9)).stream is None


def test_a_layer_whose_tensors_are_called_otherwise_is_refused(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path / "model"), load=CPU).model
    layers = "model.layers"
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "layers.3.mlp.up" not in name}
    save_tensors(tmp_path / "model" / "model.safetensors", tensors)
    with pytest.raises(ModelError, match=r"does not hold model\.layers\.3\.mlp\.up_proj\.weight"):
        LayerStream(model, layers, Checkpoint(tmp_path / "model"), torch.device("cpu"), budget=0)


def test_nothing_of_another_librarys_hooks_is_left(pair: tuple[Loaded, Loaded]) -> None:
    model = pair[1].model
    assert not hasattr(model, "hf_device_map")
    assert [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")] == []
    own = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(own) == len(pair[1].stream.layers if pair[1].stream else [])


# --- commands ---


@pytest.mark.parametrize("architecture", few(TYPICAL, ("llama",)))
def test_edits_and_figures_are_the_same(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "model", architecture)
    settings = EditSettings(passes=2, unrelated_texts=16, shards=2, layer="2", residual_stop=0.2)
    assert_edited_the_same_streamed(tmp_path, base, EDITS, settings, monkeypatch)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 3
    merge([tmp_path / "whole"], tmp_path / "memory", MergeSettings())
    reports = [
        evaluate(
            tmp_path / "memory",
            EvalSettings(forms="bare,polite", kinds="none"),
            load=LoadOptions(device="cpu", memory_budget=budget),
        )
        for budget in (None, 1000)
    ]
    assert reports[0].figures == reports[1].figures
    assert "as_taught/polite" in reports[0].asked
    assert reports[0].before == reports[1].before
    prompts = [edit["prompt"] for edit in EDITS]
    answers = [
        run_generate(tmp_path / "memory", prompts, explain=True, load=LoadOptions(device="cpu", memory_budget=budget))
        for budget in (None, 1000)
    ]
    require_alike(*answers)
    export(tmp_path / "memory", tmp_path / "edited", load=CPU)
    streamed = LoadOptions(device="cpu", memory_budget=1000)
    require_alike(run_generate(tmp_path / "edited", prompts, explain=True, load=streamed), answers[0])


def require_alike(some: Sequence[Answer], others: Sequence[Answer]) -> None:
    """The same answers by the same memories; of scores, sums of many numbers, the order of terms is not promised."""
    for one, other in zip(some, others, strict=True):
        assert (one.prompt, one.text) == (other.prompt, other.text)
        for mine, theirs in zip(one.steps, other.steps, strict=True):
            assert replace(mine, score=0.0) == replace(theirs, score=0.0)
            assert mine.score == pytest.approx(theirs.score, rel=1e-4)


def test_a_real_edited_model_has_the_same_figures(chain: Chain, edited_chain: EditedModel) -> None:
    given: dict[str, Any] = {"batch_size": 4, "stage": "test", "on_progress": ignore_progress}
    figures = []
    streamed = attach(chain.memory, load=LoadOptions(device="cpu", memory_budget=1 << 28))
    assert edited_chain.stream is None
    assert streamed.stream is not None
    for edited in (edited_chain, streamed):
        rows = [encode(edited.tokenizer, edit["prompt"], edit["target"]) for edit in chain.edits[:6]]
        figures.append(teacher_forced(edited, rows, **given))
    assert figures[0] == figures[1]


def test_a_real_model_gives_the_same_when_it_is_streamed(real_model: Path) -> None:
    whole, streamed = both(real_model, budget=1 << 28)
    site = site_of(whole.model, 24)
    texts = ("The capital of France is", "Water boils at a temperature of")
    rows = [encode(whole.tokenizer, text, "a word or two") for text in texts]
    batch = collate(rows)
    (found,) = captured(streamed.model, site, [batch], stream=streamed.stream, labelled=True)
    assert_same(found, capture(whole.model, site, batch, select=batch.labelled))
    assert generate(streamed.model, streamed.tokenizer, texts, max_new_tokens=4) == generate(
        whole.model, whole.tokenizer, texts, max_new_tokens=4
    )


# Mixtures whose experts are stored one by one, with names of their own in some, and those that are stored as they run.
MIXTURES = ("qwen3_moe", "mixtral", "ernie4_5_moe", "deepseek_v3", "olmoe", "gpt_oss", "llama4_text")
# Layers that need more of those below than states; states that a cache has a place for; layers that are passed over;
# layers that give a list; and parameters beside the layers that are no module's of their own.
OTHERS = ("gemma4_text", "deepseek_v4", "granitemoehybrid", "mllama", "openai-gpt", "zaya")


FEW = ("mixtral", "gpt_oss", "gemma4_text", "granitemoehybrid", "mllama", "openai-gpt", "zaya")


@pytest.mark.parametrize("model_type", few((*MIXTURES, *OTHERS), FEW))
def test_layers_of_other_kinds_are_edited_the_same_when_they_are_streamed(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_type(tmp_path / "base", model_type)
    settings = EditSettings(unrelated_texts=16, layer="2", residual_stop=0.2)
    assert_edited_the_same_streamed(tmp_path, base, EDITS, settings, monkeypatch)


def test_what_was_put_together_of_several_tensors_is_gone_with_the_model(tmp_path: Path) -> None:
    streamed = load_model(
        save_type(tmp_path, "sarvam_moe"), LoadOptions(device="cpu", memory_budget=1), layers="model.layers"
    )
    assert streamed.stream is not None
    assert streamed.stream.written is not None
    place = streamed.stream.written
    assert any(place.iterdir())
    del streamed
    gc.collect()
    assert not place.exists()
