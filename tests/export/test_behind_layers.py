"""Checkpoints whose edits are added behind a decoder layer do in transformers all that others do."""

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.every_type import save_type
from support.served import EDITS, PROMPTS, export_of
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.verify import verify
from wisecli.errors import ModelError
from wisecli.routing.passes.engine_checks import LostMemoryError
from wisecli.vllm_plugin.served_memory import Edited

# A mixture of experts, whose layers above run on from a cache; recurrent states; layers that run together.
TYPES = ["qwen3_moe", "falcon_h1", "gemma3n_text"]
NEW = 8


class Exported:
    """A tiny model of a type, edited behind a layer and exported."""

    def __init__(self, root: Path, model_type: str) -> None:
        self.base = save_type(root / "model", model_type)
        self.path = export_of(self.base, root)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token

    def load(self, path: Path | None = None, **named: Any) -> PreTrainedModel:
        """The model in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(path or self.path, trust_remote_code=True, **named).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The edited model."""
        return self.load()

    @cached_property
    def said(self) -> list[str]:
        """What it answers."""
        return self.answers(self.model)

    def answers(self, model: Any) -> list[str]:
        """What a model answers to a padded batch."""
        batch = self.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
        given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(**given, max_new_tokens=NEW, do_sample=False)
        texts: list[str] = self.tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return texts


@pytest.fixture(scope="module", params=TYPES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp(request.param), request.param)


def test_it_answers_its_edits_and_leaves_the_rest(exported: Exported) -> None:
    assert read_manifest(exported.path).site.base_name == read_manifest(exported.path).site.layer_module
    bare = [text.replace(" ", "") for text in exported.said]
    assert all(text.startswith(target.replace(" ", "")) for text, (_, target) in zip(bare, EDITS, strict=False))
    plain = exported.answers(AutoModelForCausalLM.from_pretrained(exported.base).eval())
    assert exported.said[len(EDITS) :] == plain[len(EDITS) :]
    assert exported.said[: len(EDITS)] != plain[: len(EDITS)]
    assert verify(exported.path, model=str(exported.base)).differences == ()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_answers_the_same(exported: Exported, copied: Callable[[Any], Any]) -> None:
    assert exported.answers(copied(exported.model)) == exported.said


def test_a_file_of_the_whole_model_answers_the_same(exported: Exported, tmp_path: Path) -> None:
    torch.save(exported.model, tmp_path / "whole.pt")
    assert exported.answers(torch.load(tmp_path / "whole.pt", weights_only=False)) == exported.said


@pytest.mark.parametrize("pieces", [None, "20KB"])
def test_saved_again_it_is_the_same_and_known(exported: Exported, tmp_path: Path, pieces: str | None) -> None:
    exported.load().save_pretrained(tmp_path, **({"max_shard_size": pieces} if pieces else {}))
    exported.tokenizer.save_pretrained(tmp_path)
    assert exported.answers(exported.load(tmp_path)) == exported.said
    assert verify(tmp_path, model=str(exported.base)).differences == ()


@pytest.mark.parametrize("place", ["auto", "cpu"])
def test_a_device_map_places_it(exported: Exported, place: str) -> None:
    assert exported.answers(exported.load(device_map=place)) == exported.said


def test_a_pipeline_answers(exported: Exported) -> None:
    ask = pipeline("text-generation", model=exported.model, tokenizer=exported.tokenizer)
    (found,) = ask(PROMPTS[0], max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert found["generated_text"].replace(" ", "").startswith(EDITS[0][1].replace(" ", ""))


# peft asks transformers by a name that transformers gives up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_goes_on_top_and_is_saved(exported: Exported, tmp_path: Path) -> None:
    tuned = get_peft_model(exported.load(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert exported.answers(tuned.eval()) == exported.said
    assert not any("wise_memory" in name for name, _ in tuned.named_parameters() if "lora" in name)
    tuned.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)  # no word was added, so no embeddings are saved


def test_without_its_head_it_is_routed_too(exported: Exported) -> None:
    body = AutoModel.from_pretrained(exported.path, trust_remote_code=True).eval()
    ids = exported.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = body(input_ids=ids).last_hidden_state
        whole = getattr(exported.model, exported.model.base_model_prefix)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, whole, rtol=0, atol=1e-5)


def test_the_bases_own_class_refuses_it(exported: Exported) -> None:
    own = type(AutoModelForCausalLM.from_pretrained(exported.base))
    with pytest.raises(Exception, match="Auto classes, with trust_remote_code=True"):
        own.from_pretrained(exported.path)


@pytest.mark.parametrize("name", ["forward", "prepare_inputs_for_generation"])
def test_who_looks_for_what_it_takes_finds_what_the_base_does(exported: Exported, name: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(exported.base)
    assert inspect.signature(getattr(exported.model, name)) == inspect.signature(getattr(base, name))


def test_a_lost_memory_is_an_error(exported: Exported, tmp_path: Path) -> None:
    for path in exported.path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model-side-memory.safetensors").unlink()
    with pytest.raises(OSError, match="model-side-memory"):
        exported.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.unlink()
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if "side" not in file}
    index.write_text(json.dumps(content))
    with pytest.raises((OSError, LostMemoryError), match="lacks tensors"):
        exported.load(tmp_path)


def test_the_bases_weights_are_carried_over_and_the_memory_is_the_layers_width(exported: Exported) -> None:
    tensors, carried = (
        load_file(path) for path in (exported.base / "model.safetensors", exported.path / "model-base.safetensors")
    )
    assert tensors.keys() == carried.keys()
    assert all(torch.equal(tensors[name], carried[name]) for name in tensors)
    side = load_file(exported.path / "model-side-memory.safetensors")
    assert all(".2.wise_memory." in name for name in side)


def test_there_is_no_matrix_to_merge_it_into(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="added behind layer 2"):
        export(exported.path.parent / "memory", tmp_path / "merged", "merged")


def test_engines_are_told_where_the_memory_is_and_refuse_streams(exported: Exported) -> None:
    described = json.loads((exported.path / "config.json").read_text())["wise"]
    if described["streams"] is None:
        assert Edited.of(described).behind
    else:
        with pytest.raises(ValueError, match="one of several streams"):
            Edited.of(described)


# Upper layers that are given a prompt's last token alone; and models of two layers, the first of which is read, too.
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("gemma4_text", {}), ("llama", {"num_hidden_layers": 2}), ("qwen3_moe", {"num_hidden_layers": 2})],
)
def test_the_layer_that_is_chosen_by_itself_answers_in_a_batch_and_without_a_cache(
    tmp_path: Path, model_type: str, changes: dict[str, int]
) -> None:
    base = save_type(tmp_path / "model", model_type, **changes)
    path = export_of(base, tmp_path, layer="auto")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()

    def answers(of: PreTrainedModel, prompts: list[str], **named: Any) -> list[str]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = of.generate(**given, max_new_tokens=NEW, do_sample=False, **named)
        texts: list[str] = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return texts

    found = answers(model, list(PROMPTS))
    bare = [text.replace(" ", "") for text in found]
    assert all(text.startswith(target.replace(" ", "")) for text, (_, target) in zip(bare, EDITS, strict=False))
    assert found[len(EDITS) :] == answers(plain, list(PROMPTS))[len(EDITS) :]
    assert found == [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert found == answers(model, list(PROMPTS), use_cache=False)


def test_a_model_that_reads_padded_rows_otherwise_is_edited_with_each_row_alone(tmp_path: Path) -> None:
    path = export_of(save_type(tmp_path / "model", "trocr"), tmp_path)  # its positions count the padding
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    for prompt, target in EDITS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        said = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert said.replace(" ", "").startswith(target.replace(" ", ""))
