import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import (
    alone,
    choice_of,
    greedy_by_loop,
    hooked,
    manifest_for,
    memory_for,
    random_rows,
    routed_by_loop,
    save_tiny,
    site_of,
)
from support.loading import CPU
from support.thorough import few
from support.tiny_models import SAMPLE_EDITS, TINY_CONFIGS, TYPICAL, Chain, loader_of, tiny_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import wisecli
from wisecli.artifacts.memory_manifest import Manifest, read_memory, write_memory
from wisecli.commands.checkpoint.export import Publication, WeightFiles, export
from wisecli.commands.checkpoint.verify import verify
from wisecli.data.corpus import unrelated_texts
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError, ModelError, SettingsError, WrongBaseError
from wisecli.export.model_card import model_card
from wisecli.export.routed.checkpoint import write_merged, write_routed
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.prompts.tokenization import Row
from wisecli.routing.memories.side_memory import SideMemory

EDITS = [Edit("first", "ba be", "bi bo"), Edit("second", "da de | do", "di")]
LENGTHS = (1, 5, 11, 8, 3, 6, 2, 9, 4, 7, 4, 10)
ROWS = random_rows(*[(length, 2) for length in LENGTHS])
PROMPTS = [row.prompt for row in ROWS]
LAYOUTS = ("single", "sharded", "unprefixed")


@dataclass(frozen=True)
class Kind:
    kind: str = "matrix"
    pooling: str = "last"
    memories: int = 1


LOOKUP = Kind("lookup", memories=3)
KINDS = [Kind(), Kind("matrix", "mean"), Kind(memories=2), LOOKUP, Kind("facts", memories=2)]
# One architecture of each trait with one kind of memory, one with every kind; all others if there is time.
CASES = [(name, KINDS[0]) for name in TYPICAL] + [("llama", kind) for kind in KINDS[1:]]
OTHERS = [
    *((name, KINDS[0]) for name in sorted(TINY_CONFIGS) if name not in TYPICAL),
    *((name, kind) for name in TYPICAL if name != "llama" for kind in KINDS[1:]),
]


@dataclass(frozen=True)
class Exported:
    base: Path
    path: Path
    manifest: Manifest

    @property
    def memory(self) -> SideMemory:
        return self.manifest.memory

    @cached_property
    def model(self) -> PreTrainedModel:
        """It, loaded; whoever changes anything of it loads another."""
        return load(self.path)


def save_base(directory: Path, architecture: str, layout: str) -> Path:
    save_tiny(directory, architecture, loudness=1, shard="20KB" if layout == "sharded" else None)
    if layout == "unprefixed":
        tensors = load_file(directory / "model.safetensors")
        stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        save_file(stripped, directory / "model.safetensors", {"format": "pt"})
    return directory


def manifest_of(base: Path, architecture: str, kind: Kind) -> Manifest:
    model = tiny_model(architecture)
    site = site_of(model, 2)
    memory = memory_for(model, site, kind=kind.kind, pooling=kind.pooling, memories=kind.memories)
    return manifest_for(base, memory, EDITS, layer=2)


def export_tiny(
    root: Path, architecture: str, kind: Kind = KINDS[0], *, layout: str = "single", link: bool = False
) -> Exported:
    base = save_base(root / f"base-{architecture}", architecture, layout)
    manifest = manifest_of(base, architecture, kind)
    output = root / f"edited-{architecture}"
    output.mkdir()
    write_routed(output, base, Checkpoint(base), manifest, Packing(link=link))
    return Exported(base, output, manifest)


@pytest.fixture(scope="module")
def exported_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Gives the export of an architecture with a kind of memory, made when it is first asked for."""
    return cache(lambda *case: export_tiny(tmp_path_factory.mktemp("exported"), *case))


def load(path: Path, **named: Any) -> PreTrainedModel:
    architecture = json.loads((path / "config.json").read_text())["model_type"].removeprefix("wise_")
    return loader_of(architecture).from_pretrained(path, trust_remote_code=True, **named).eval()


def padded(rows: list[tuple[int, ...]], *, left: bool) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def contents(directory: Path) -> dict[str, tuple[str, Tensor]]:
    """Every tensor of a checkpoint with the file it is in."""
    found: dict[str, tuple[str, Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            found |= {name: (path.name, stream.get_tensor(name)) for name in stream.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(("architecture", "kind"), few([*CASES, *OTHERS], CASES), ids=str)
def test_the_exported_checkpoint_is_the_base_with_the_memory_installed(
    exported_of: Callable[..., Exported], architecture: str, kind: Kind
) -> None:
    exported = exported_of(architecture, kind)
    model = exported.model
    base = tiny_model(architecture)
    site = site_of(base, 2)
    expected, untouched, choices = [], [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        choices.append(choice_of(base, site, exported.memory, prompt))
        with torch.no_grad():
            untouched.append(base(input_ids=ids, use_cache=False).logits[0])
            with hooked(base, site, routed_by_loop(exported.memory, len(prompt), choices[-1])):
                expected.append(base(input_ids=ids, use_cache=False).logits[0])
    assert set(choices) > {None}
    assert any((one - other).abs().max() > 0.1 for one, other in zip(expected, untouched, strict=True))
    routed = tiny_model(architecture)
    site.install(routed, exported.memory)
    for prompt, by_loop in zip(PROMPTS, expected, strict=True):
        with torch.no_grad():
            logits = [one(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for one in (model, routed)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[0], by_loop, rtol=0, atol=1e-4)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_padding_on_either_side_changes_no_logit(exported_of: Callable[..., Exported], kind: Kind, left: bool) -> None:
    model = exported_of("llama", kind).model
    batch = padded(PROMPTS, left=left)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits
        for index, prompt in enumerate(PROMPTS):
            single = model(input_ids=torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(
                together[index][batch["attention_mask"][index].bool()], single, rtol=0, atol=1e-4
            )


@pytest.mark.parametrize(("architecture", "kind"), few([*CASES, *OTHERS], CASES), ids=str)
def test_generation_in_padded_batches_with_a_cache_is_that_of_each_prompt_alone(
    exported_of: Callable[..., Exported], architecture: str, kind: Kind
) -> None:
    exported = exported_of(architecture, kind)
    model = exported.model
    site, count, prompts = site_of(tiny_model(architecture), 2), 4, PROMPTS[:6]
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = padded(prompts, left=True)
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    alone_too = [
        model.generate(**padded([prompt], left=True), **settings)[0, len(prompt) :].tolist() for prompt in prompts
    ]
    base = tiny_model(architecture)
    by_loop = [greedy_by_loop(base, site, exported.memory, prompt, count, end=None) for prompt in prompts]
    unedited = [greedy_by_loop(base, site, None, prompt, count, end=None) for prompt in prompts]
    assert by_loop != unedited
    assert alone_too == by_loop
    assert together == by_loop


def test_a_second_batch_is_not_answered_by_the_choices_of_the_first(exported_of: Callable[..., Exported]) -> None:
    model = exported_of("llama", Kind()).model
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fresh = model.generate(**padded(PROMPTS[3:5], left=True), **settings)
    model.generate(**padded(PROMPTS[:2], left=True), **settings)
    assert torch.equal(model.generate(**padded(PROMPTS[3:5], left=True), **settings), fresh)


@pytest.mark.parametrize("architecture", few(TYPICAL, ("gemma2", "gpt2")))
def test_without_a_cache_each_token_is_routed_as_with_one(
    exported_of: Callable[..., Exported], architecture: str
) -> None:
    model = exported_of(architecture, LOOKUP).model
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = padded(PROMPTS, left=True)
    assert torch.equal(model.generate(**batch, **settings, use_cache=False), model.generate(**batch, **settings))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    few(product(TYPICAL, KINDS[:2]), [*product(TYPICAL, KINDS[:1]), ("llama", KINDS[1])]),
    ids=str,
)
def test_the_model_without_its_head_routes_too(
    exported_of: Callable[..., Exported], architecture: str, kind: Kind
) -> None:
    exported = exported_of(architecture, kind)
    causal, bare = load(exported.path), AutoModel.from_pretrained(exported.path, trust_remote_code=True).eval()
    expected: list[Tensor] = []
    causal.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: expected.append(inputs[0]))
    for prompt in PROMPTS:
        with torch.no_grad():
            hidden = bare(input_ids=torch.tensor([prompt])).last_hidden_state
            causal(input_ids=torch.tensor([prompt]))
        torch.testing.assert_close(hidden, expected[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("architecture", "kind"), few([*CASES, *OTHERS], CASES), ids=str)
def test_saved_again_it_is_whole_and_the_same(
    exported_of: Callable[..., Exported], tmp_path: Path, architecture: str, kind: Kind
) -> None:
    exported = exported_of(architecture, kind)
    model = load(exported.path)
    pieces = {"max_shard_size": "20KB"} if kind == KINDS[0] else {}
    model.save_pretrained(tmp_path / "again", **pieces)
    assert verify(tmp_path / "again").differences == ()
    again, ids = load(tmp_path / "again"), torch.tensor([PROMPTS[0]])
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("link", [False, True])
def test_the_bases_weight_files_are_carried_over_byte_for_byte(
    tmp_path: Path, architecture: str, layout: str, link: bool
) -> None:
    exported = export_tiny(tmp_path, architecture, layout=layout, link=link)
    weights = sorted(exported.base.glob("*.safetensors"))
    assert (len(weights) > 1) == (layout == "sharded")
    for path in weights:
        copy = exported.path / ("model-base.safetensors" if path.name == "model.safetensors" else path.name)
        assert copy.read_bytes() == path.read_bytes()
        assert (copy.stat().st_ino == path.stat().st_ino) == link
    assert not (exported.path / "model.safetensors").exists()
    model, base = load(exported.path), tiny_model(architecture)
    chosen = choice_of(base, site_of(base, 2), exported.memory, PROMPTS[2])
    with torch.no_grad(), hooked(base, site_of(base, 2), routed_by_loop(exported.memory, len(PROMPTS[2]), chosen)):
        expected = base(input_ids=torch.tensor([PROMPTS[2]])).logits
        torch.testing.assert_close(model(input_ids=torch.tensor([PROMPTS[2]])).logits, expected, rtol=0, atol=1e-4)


def test_what_stands_beside_the_weights_comes_along(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base-llama")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "pytorch_model.bin").write_bytes(b"the weights once more")
    (base / "README.md").write_text("about the base")
    output = tmp_path / "edited"
    output.mkdir()
    manifest = manifest_of(base, "llama", KINDS[0])
    write_routed(output, base, Checkpoint(base), manifest)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    assert not (output / "pytorch_model.bin").exists()
    assert not (output / "README.md").exists()
    card = model_card(manifest, "routed", base=base)
    assert "about the base" not in card
    assert "| ba be | bi bo |" in card
    assert "| da de \\| do | di |" in card
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    assert tokenizer("ba be")["input_ids"] == [2, 3]


def test_the_tokenizer_is_read_by_the_class_that_reads_the_bases(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen2")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "TokenizersBackend"}))
    output = tmp_path / "edited"
    output.mkdir()
    write_routed(output, base, Checkpoint(base), manifest_of(base, "qwen2", KINDS[0]))
    tokenizers = [AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (base, output)]
    assert [type(tokenizer).__name__ for tokenizer in tokenizers] == ["Qwen2Tokenizer"] * 2
    assert tokenizers[0]("ba be. bi")["input_ids"] == tokenizers[1]("ba be. bi")["input_ids"] != []


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_manifest_of_an_export_says_what_that_of_the_memory_said(
    exported_of: Callable[..., Exported], kind: Kind
) -> None:
    exported = exported_of("llama", kind)
    read = read_memory(exported.path)
    assert read.memory.tensors.keys() == exported.memory.tensors.keys()
    for name, tensor in exported.memory.tensors.items():
        assert torch.equal(read.memory.tensors[name], tensor)
    assert read.memory.describe() == exported.memory.describe()
    assert read.memory.by_edit == (kind.kind != "matrix")
    assert read.edits == exported.manifest.edits
    assert read.calibrations == exported.manifest.calibrations
    assert read.owners == exported.manifest.owners


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
def test_without_trust_it_is_refused_and_not_loaded_without_the_edit(
    exported_of: Callable[..., Exported], loader: Any
) -> None:
    exported = exported_of("llama", KINDS[0])
    with pytest.raises(ValueError, match="trust_remote_code"):
        loader.from_pretrained(exported.path, trust_remote_code=False)


OF_A_MATRIX = ("columns", "delta")
OF_A_LOOKUP = (
    *("residuals", "key_to_residual", "whitened_keys", "key_to_edit", "cosine_offset", "whitening_index"),
    *("directions", "gains", "floors"),
)
LOST = [*((KINDS[0], name) for name in OF_A_MATRIX), *((LOOKUP, name) for name in OF_A_LOOKUP)]


@pytest.mark.parametrize("indexed", [True, False], ids=["still in the index", "gone from the index"])
@pytest.mark.parametrize("loader", few([AutoModelForCausalLM, AutoModel], [AutoModelForCausalLM]))
@pytest.mark.parametrize(
    ("kind", "lost"),
    few(LOST, [(KINDS[0], "delta"), (LOOKUP, "residuals"), (LOOKUP, "key_to_edit")]),
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_a_missing_tensor_of_the_memory_is_an_error(
    exported_of: Callable[..., Exported], tmp_path: Path, loader: Any, kind: Kind, lost: str, indexed: bool
) -> None:
    damaged = shutil.copytree(exported_of("llama", kind).path, tmp_path / "damaged", copy_function=os.link)
    remove_tensor(damaged, lost, indexed=indexed)
    with pytest.raises(OSError, match=lost):
        loader.from_pretrained(damaged, trust_remote_code=True)


def remove_tensor(directory: Path, lost: str, *, indexed: bool) -> None:
    side = directory / "model-side-memory.safetensors"
    tensors = load_file(side)
    name = next(name for name in tensors if name.endswith(f".{lost}"))
    del tensors[name]
    side.unlink()
    save_file(tensors, side, {"format": "pt"})
    if not indexed:
        index = directory / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"][name]
        index.unlink()
        index.write_text(json.dumps(content))


def test_half_precision_loads(exported_of: Callable[..., Exported], architecture: str) -> None:
    model = load(exported_of(architecture, KINDS[0]).path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = model(**padded(PROMPTS, left=True)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize("architecture", few(TYPICAL, ("gemma2", "gpt2", "llama")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_kept_in_half_precision_answers_under_any(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    base = save_tiny(tmp_path / "base", architecture, loudness=1)
    manifest = manifest_of(base, architecture, LOOKUP)
    halved = {name: manifest.memory.tensors[name].half() for name in ("whitened_keys", "residuals")}
    memory = replace(manifest.memory, tensors={**manifest.memory.tensors, **halved})
    output = tmp_path / "edited"
    output.mkdir()
    write_routed(output, base, Checkpoint(base), replace(manifest, memory=memory))
    stored = load_file(output / "model-side-memory.safetensors")
    assert {str(stored[name].dtype) for name in stored if name.endswith((".whitened_keys", ".residuals"))} == {
        "torch.float16"
    }
    model = load(output, dtype=dtype)
    routed = model.get_submodule(manifest.site.module)
    assert torch.float16 not in (routed.whitened_keys.dtype, routed.residuals.dtype)
    reference = tiny_model(architecture)
    whole = replace(memory, tensors={**memory.tensors, **{name: one.float() for name, one in halved.items()}})
    for prompt in PROMPTS:
        chosen = choice_of(reference, manifest.site, whole, prompt)
        with torch.no_grad(), hooked(reference, manifest.site, routed_by_loop(whole, len(prompt), chosen)):
            expected = reference(input_ids=torch.tensor([prompt]), use_cache=False).logits
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits
        assert (logits.dtype, routed.weight.dtype) == (dtype, dtype)
        assert logits.isfinite().all()
        if dtype == torch.float32:
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "says"), [(LOOKUP, "--mode merge"), (Kind(memories=2), "several")], ids=str)
def test_without_a_single_matrix_merged_is_refused(tmp_path: Path, kind: Kind, says: str) -> None:
    base, output = save_tiny(tmp_path / "base"), tmp_path / "merged"
    output.mkdir()
    with pytest.raises(ModelError, match=says) as caught:
        write_merged(output, base, Checkpoint(base), manifest_of(base, "llama", kind))
    assert caught.value.exit_code == 2
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "layout"),
    few(product(TYPICAL, LAYOUTS), {*product(TYPICAL, ["single"]), *product(["gpt2", "llama"], LAYOUTS)}),
)
def test_merged_is_the_stock_model_with_one_matrix_changed(tmp_path: Path, architecture: str, layout: str) -> None:
    base = save_base(tmp_path / "base", architecture, layout)
    manifest = manifest_of(base, architecture, KINDS[0])
    output = tmp_path / "merged"
    output.mkdir()
    write_merged(output, base, Checkpoint(base), manifest)
    assert (output / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not list(output.glob("*.py"))
    before, after = contents(base), contents(output)
    weight = next(name for name in before if manifest.site.weight.endswith(name))
    assert [(name, file) for name, (file, _) in before.items()] == [(name, file) for name, (file, _) in after.items()]
    for name in before.keys() - {weight}:
        assert before[name][1].numpy().tobytes() == after[name][1].numpy().tobytes()
    delta = torch.zeros(manifest.site.d, manifest.site.d_ff)
    for place, column in enumerate(manifest.memory.tensors["columns"][0].tolist()):
        delta[:, column] = manifest.memory.tensors["delta"][0][:, place]
    delta = delta.T if manifest.site.transposed else delta
    torch.testing.assert_close(after[weight][1], before[weight][1] + delta, rtol=0, atol=1e-6)
    if (layout, architecture) == ("unprefixed", "llama"):
        return
    model, reference = AutoModelForCausalLM.from_pretrained(output).eval(), tiny_model(architecture)
    assert type(model) is type(reference)
    with torch.no_grad():
        reference.get_submodule(manifest.site.module).weight += delta
    for row in ROWS:
        torch.testing.assert_close(alone(model, row), alone(reference, row), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", few(["gemma2", "granite", "llama"], ["gemma2"]))
def test_the_merged_export_says_what_being_always_on_costs(tmp_path: Path, architecture: str) -> None:
    base = save_tiny(tmp_path / "base", architecture)
    manifest = manifest_of(base, architecture, KINDS[0])
    tensors = {**manifest.memory.tensors, "delta": 0.3 * manifest.memory.tensors["delta"]}
    manifest = replace(manifest, memory=replace(manifest.memory, tensors=tensors))
    (tmp_path / "memory").mkdir()
    write_memory(tmp_path / "memory", manifest)
    report = export(tmp_path / "memory", tmp_path / "merged", "merged", load=CPU)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, tmp_path / "merged")]
    tokenizer = AutoTokenizer.from_pretrained(base)
    same: list[bool] = []
    for text in unrelated_texts(200, seed=1):
        first, *rest = text.split()
        if not rest:
            continue
        row = Row(tuple(tokenizer(first)["input_ids"]), tuple(tokenizer(" ".join(rest))["input_ids"]))
        before, after = (alone(model, row).argmax(-1) for model in models)
        same += (before == after).tolist()
    assert report.tokens == len(same)
    assert report.locality == pytest.approx(sum(same) / len(same))
    assert 0 < sum(same) < len(same)
    note = f"{report.locality:.1%} of {report.tokens} next tokens"
    assert note in (tmp_path / "merged" / "README.md").read_text()


# Of the sample edits' prompts and unrelated ones, a few that are asked one by one, too.
SOME = [0, 1, 2, -2, -1]
# Loads an export as somebody does who has transformers only, and says what came out of it as JSON.
LOAD_ALONE = """
import json
import sys

sys.modules["wisecli"] = None

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

edited, base, damaged, prompts, some = json.loads(sys.argv[1])
said = {}


def refusal(path, **named):
    try:
        AutoModelForCausalLM.from_pretrained(path, **named)
    except Exception as error:
        return [type(error).__name__, str(error)]


def answers(model, prompts, size, **named):
    texts = []
    for first in range(0, len(prompts), size):
        batch = tokenizer(prompts[first : first + size], return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=12, do_sample=False, **named)
        texts += [tokenizer.decode(row[batch.input_ids.shape[1] :], skip_special_tokens=True) for row in output]
    return texts


said["untrusted"] = refusal(edited, trust_remote_code=False)
said["damaged"] = refusal(damaged, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(edited, trust_remote_code=True, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(edited, trust_remote_code=True).eval()
said["single"] = answers(model, [prompts[place] for place in some], 1)
said["batch"] = answers(model, prompts, 64)
said["unedited"] = answers(AutoModelForCausalLM.from_pretrained(base).eval(), prompts, 64)
with torch.no_grad():
    bare = AutoModel.from_pretrained(edited, trust_remote_code=True).eval()
    batch = tokenizer(prompts[:2], return_tensors="pt", padding=True)
    difference = model.lm_head(bare(**batch).last_hidden_state) - model(**batch).logits
    said["headless"] = float(difference.abs().max())
halved = AutoModelForCausalLM.from_pretrained(edited, trust_remote_code=True, dtype=torch.bfloat16).eval()
said["halved"] = answers(halved, prompts[:3], 64)
said["dtypes"] = sorted({str(parameter.dtype) for parameter in halved.parameters()})
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the chain's export does in a process that cannot import wisecli."""
    root = tmp_path_factory.mktemp("alone")
    damaged = root / "damaged"
    shutil.copytree(chain.exported, damaged, copy_function=os.link)
    remove_tensor(damaged, "residuals", indexed=False)
    prompts = [*(edit["prompt"] for edit in chain.edits), *unrelated_prompts()]
    arguments = json.dumps([str(chain.exported), str(chain.model), str(damaged), prompts, SOME])
    environment = {**os.environ, "HF_HOME": str(root), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", LOAD_ALONE, arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def unrelated_prompts() -> list[str]:
    return (SAMPLE_EDITS.parent / "unrelated.txt").read_text().splitlines()


def test_every_edit_is_answered_from_its_bare_prompt_with_transformers_alone(
    chain: Chain, said: dict[str, Any]
) -> None:
    assert [text.strip() for text in said["batch"][: len(chain.edits)]] == [edit["target"] for edit in chain.edits]


def test_unrelated_prompts_get_the_base_models_text_with_transformers_alone(chain: Chain, said: dict[str, Any]) -> None:
    unrelated = slice(len(chain.edits), None)
    assert said["batch"][unrelated] == said["unedited"][unrelated]
    assert len(said["unedited"][unrelated]) == len(unrelated_prompts())


def test_padded_batches_give_what_single_prompts_give_with_transformers_alone(said: dict[str, Any]) -> None:
    assert [said["batch"][place] for place in SOME] == said["single"]


def test_without_trust_or_with_a_tensor_lost_nothing_loads_with_transformers_alone(said: dict[str, Any]) -> None:
    assert said["untrusted"][0] == "ValueError"
    assert "trust_remote_code" in said["untrusted"][1]
    assert said["damaged"][0] == "OSError"
    assert "residuals" in said["damaged"][1]


def test_other_ways_to_load_work_with_transformers_alone(chain: Chain, said: dict[str, Any]) -> None:
    assert said["headless"] < 1e-3
    assert said["dtypes"] == ["torch.bfloat16"]
    assert [text.strip() for text in said["halved"]] == [edit["target"] for edit in chain.edits[:3]]


# --- the command's forms and options ---


@pytest.fixture
def memory_dir(tmp_path: Path) -> Path:
    """A memory of one matrix, and its base beside it."""
    base = save_tiny(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nabout the base")
    (tmp_path / "memory").mkdir()
    write_memory(tmp_path / "memory", manifest_of(base, "llama", KINDS[0]))
    return tmp_path / "memory"


def logits_of(model: PreTrainedModel) -> list[Tensor]:
    return [alone(model, row) for row in ROWS]


def require_same(some: list[Tensor], others: list[Tensor], *, bits: bool = True) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other) if bits else torch.allclose(one, other, atol=1e-4)


def test_a_delta_is_the_memory_alone_and_applies_to_the_base(memory_dir: Path, tmp_path: Path) -> None:
    base, delta = tmp_path / "base", tmp_path / "delta"
    report = export(memory_dir, delta, "delta")
    assert sorted(path.name for path in delta.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "memory.safetensors",
        "router.json",
    ]
    assert report.bytes < 1.1 * (memory_dir / "memory.safetensors").stat().st_size + 20_000
    export(memory_dir, tmp_path / "direct")
    export(delta, tmp_path / "applied", model=str(base))
    direct, applied = (logits_of(load(tmp_path / name)) for name in ("direct", "applied"))
    require_same(applied, direct)
    loaded, tokenizer = wisecli.load(str(base), delta, device="cpu")
    require_same(logits_of(loaded), direct)
    assert tokenizer("ba be")["input_ids"] == [2, 3]
    with pytest.raises(WrongBaseError):
        wisecli.load(str(save_tiny(tmp_path / "other", seed=3)), delta)


@pytest.mark.parametrize("form", ["routed", "merged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_type_that_is_asked_for_is_the_one_it_loads_in(
    memory_dir: Path, tmp_path: Path, form: Any, dtype: str
) -> None:
    export(memory_dir, tmp_path / "out", form, weights=WeightFiles(dtype=dtype), load=CPU)
    export(memory_dir, tmp_path / "plain", form, load=CPU)
    model = load(tmp_path / "out", dtype="auto")
    weight = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    assert weight.dtype == getattr(torch, dtype)
    require_same(logits_of(model), logits_of(load(tmp_path / "plain", dtype=getattr(torch, dtype))))
    if form == "routed":
        assert verify(tmp_path / "out").differences == ()


@pytest.mark.parametrize("form", ["routed", "merged"])
def test_files_no_larger_than_asked_for_hold_the_same_model(memory_dir: Path, tmp_path: Path, form: Any) -> None:
    export(memory_dir, tmp_path / "out", form, weights=WeightFiles(file_bytes=20_000), load=CPU)
    export(memory_dir, tmp_path / "plain", form, load=CPU)
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 2
    require_same(*(logits_of(load(tmp_path / name)) for name in ("out", "plain")))


def test_links_and_other_types_exclude_each_other(memory_dir: Path, tmp_path: Path) -> None:
    for weights in (WeightFiles(link=True, dtype="float16"), WeightFiles(link=True, file_bytes=1000)):
        with pytest.raises(SettingsError, match="--link keeps the base's files as they are"):
            export(memory_dir, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_the_card_names_the_base_its_licence_and_what_was_measured(memory_dir: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"results": {"zsre": {"reliability": 0.987654, "before": {"reliability": 0.1}}}}))
    export(memory_dir, tmp_path / "out", publication=Publication(metrics=report))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "base"
    assert str(tmp_path) not in card.content
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("zsre", "reliability", 0.9877)
    assert "| zsre | reliability | 0.988 |" in card.text
    assert "2 edits" in card.text
    export(memory_dir, tmp_path / "bare", publication=Publication(card=False))
    assert not (tmp_path / "bare" / "README.md").exists()


def test_the_card_has_generated_answers_first_and_no_figure_of_a_single_form(memory_dir: Path, tmp_path: Path) -> None:
    asked = {"as_taught": 0.9, "as_taught_trained": 0.95, "as_taught_unseen": 0.85, "other_question": 0.05}
    figures = {"zsre": {**asked, "as_taught/chat": 0.7, "reliability": 1.0}, "wild": {"wild_as_taught": 0.8}}
    (tmp_path / "report.json").write_text(json.dumps({"results": figures}))
    export(memory_dir, tmp_path / "out", publication=Publication(metrics=tmp_path / "report.json"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    rows = [
        "| zsre | as taught | 0.900 | 0.950 | 0.850 |",
        "| zsre | other questions about an edit's subject | 0.050 |",
        "| wild | wild\\_as\\_taught | 0.800 |",
        "| dataset | diagnosis, teacher-forced | edited |",
        "| zsre | reliability | 1.000 |",
    ]
    places = [card.text.index(row) for row in rows]
    assert places == sorted(places)
    assert "chat" not in card.text
    assert [one.metric_type for one in card.data.eval_results] == [*asked, "reliability", "wild_as_taught"]


def test_the_card_shows_what_edits_say_letter_by_letter(memory_dir: Path, tmp_path: Path) -> None:
    manifest = read_memory(memory_dir)
    hostile = (
        "<img src=x onerror=alert(1)> [a](javascript:b) ![c](//d) `e` **f** | g\n# h https://i www.j @k \x1b[2J\u202e"
    )
    edits = (Edit("one", hostile, hostile),)
    card = model_card(replace(manifest, edits=edits, model=f"/home/ann/{hostile}"), "routed", base=tmp_path / "base")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---", 2)[2])
    assert "<img" not in html
    assert not re.search(r"<(a|strong|em|script)\b", html)
    assert "<code>e</code>" not in html
    assert "&lt;img src=x onerror=alert(1)&gt; [a](javascript:b) ![c](//d) `e` **f** | g" in html
    assert "/home/ann" not in card
    assert "1 edit of base" in card
    on_hub = model_card(replace(manifest, model="someone/something"), "delta", base=tmp_path / "base")
    assert "of someone/something" in on_hub


NO_REPORTS = ["{", "[]", '{"results": {}}', '{"results": {"zsre": 3}}', '{"results": {"a": {}}}']


@pytest.mark.parametrize("content", NO_REPORTS)
def test_figures_that_are_no_report_are_refused(memory_dir: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"report\.json"):
        export(memory_dir, tmp_path / "out", publication=Publication(metrics=tmp_path / "report.json"))
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps what it is sent."""

    sent: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {"url": f"http://{self.headers['Host']}/me/edited", "id": "me/edited"}
        if "/preupload/" in self.path:
            named = [one["path"] for one in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    type(self).sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/edited/commit/1", "commitOid": "1"}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_it_is_sent_to_the_hub_file_by_file(memory_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.sent = {}
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    report = export(memory_dir, tmp_path / "out", "delta", publication=Publication(push_to="me/edited"))
    server.shutdown()
    server.server_close()
    assert report.pushed is not None and report.pushed.endswith("/me/edited")
    assert {name: content for name, content in Hub.sent.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }


def test_a_hub_that_cannot_be_reached_leaves_what_was_written(
    memory_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="is written, but could not be sent to me/edited"):
        export(memory_dir, tmp_path / "out", "delta", publication=Publication(push_to="me/edited"))
    assert (tmp_path / "out" / "router.json").is_file()
