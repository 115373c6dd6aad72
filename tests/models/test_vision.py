"""Models that read images: their text model is edited, the rest stays as it is, images may stand before any text."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.every_type import save_type
from support.helpers import (
    WORDS,
    choice_of,
    hooked,
    manifest_for,
    memory_for,
    random_rows,
    routed_by_loop,
    save_tiny,
    site_of,
    tiny_tokenizer,
)
from support.loading import CPU
from support.served import EDITS as ASKED
from support.served import export_of
from support.thorough import few
from support.tiny_models import IMAGE_TOKEN, TINY_CONFIGS, VOCABULARY, tiny_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GemmaConfig,
)

import wisecli
from wisecli.artifacts.memory_manifest import read_memory
from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, LoadOptions, MergeSettings
from wisecli.errors import ModelError, UnknownArchitectureError
from wisecli.evaluation.edited_model import attach
from wisecli.export.model_card import model_card
from wisecli.export.routed.checkpoint import write_routed
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import known_layout, layer_count
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.loading import load_model
from wisecli.routing.memories.side_memory import SideMemory

FAMILIES = sorted(name for name, config in TINY_CONFIGS.items() if hasattr(config, "vision_config"))
QUICK = [*zip(FAMILIES, ["matrix", "lookup"], strict=True)]
EDITS: list[dict[str, Any]] = [
    {"prompt": "ba be bi", "target": "do du", "rephrases": ["be ba bi"]},
    {"prompt": "ka ke ki ko", "target": "fa", "locality": [{"prompt": "mu ma", "answer": "me mi"}]},
    {"prompt": "la ma me", "target": "ga ge gi"},
]
UNRELATED = ("so su sa", "ti", "ru re ro ra ri")
PATCHES = 4
ROWS = [row.prompt for row in random_rows(*[(length, 1) for length in (1, 5, 9, 3, 7)], seed=4)]
# Router, routing and kind of a memory.


def pictured(
    architecture: str, rows: Sequence[Sequence[int]], *, seed: int = 0, text_only: int = 0
) -> dict[str, Tensor]:
    """What a model takes for rows of tokens, padded on the left, with a random image before all but the last few."""
    generator = torch.Generator().manual_seed(seed)
    images = len(rows) - text_only
    tokens = [[*[IMAGE_TOKEN] * (PATCHES if place < images else 0), *row] for place, row in enumerate(rows)]
    width = max(map(len, tokens))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in tokens])
    given = {"input_ids": ids, "attention_mask": mask}
    if architecture == "llava":
        return {**given, "pixel_values": torch.randn(images, 3, 8, 8, generator=generator)}
    return {
        **given,
        "pixel_values": torch.randn(16 * images, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


@dataclass(frozen=True)
class Vision:
    architecture: str
    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    def base(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.model).eval()

    def exported(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.root / "edited", trust_remote_code=True).eval()

    def tokens(self, text: str) -> list[int]:
        return list(tiny_tokenizer()(text)["input_ids"])


def save_near_sighted(directory: Path, architecture: str) -> Path:
    """A tiny model with little attention: what goes before a random model's token turns its key into any other."""
    save_tiny(directory, architecture, loudness=1)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter.data *= 0.03
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vision:
    """An edited model of each family: shards, a lookup, a merged matrix and what is exported of them."""
    root = tmp_path_factory.mktemp("vision")
    base = save_near_sighted(root / "model", str(request.param))
    (root / "edits.jsonl").write_text("\n".join(map(json.dumps, EDITS)))
    run_edit(str(base), root / "edits.jsonl", root / "shards", EditSettings(unrelated_texts=64, layer="2"))
    merge([root / "shards"], root / "memory", MergeSettings())
    at_matrix = EditSettings(unrelated_texts=64, layer="2", site="matrix")
    run_edit(str(base), root / "edits.jsonl", root / "shards-at-matrix", at_matrix)
    merge([root / "shards-at-matrix"], root / "matrix", MergeSettings(mode="merge"))
    export(root / "memory", root / "edited", load=CPU)
    return Vision(str(request.param), root)


def contents(directory: Path) -> dict[str, bytes]:
    tensors = {name: one for path in directory.glob("*.safetensors") for name, one in load_file(path).items()}
    return {name: one.numpy().tobytes() for name, one in tensors.items()}


@torch.no_grad()
def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**given).logits
    return logits


def greedy(model: Any, given: dict[str, Tensor], count: int) -> list[list[int]]:
    output = model.generate(**given, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers: list[list[int]] = output[:, given["input_ids"].shape[1] :].tolist()
    return answers


def answers_of(vision: Vision, model: Any, *, image: bool) -> list[str]:
    tokenizer, said = tiny_tokenizer(), []
    for edit in EDITS:
        rows = [vision.tokens(edit["prompt"])]
        count = len(vision.tokens(edit["target"]))
        given = pictured(vision.architecture, rows) if image else {"input_ids": torch.tensor(rows)}
        said.append(tokenizer.decode(greedy(model, given, count)[0]))
    return said


@pytest.mark.parametrize("architecture", few(FAMILIES, FAMILIES[:1]))
def test_every_command_works_on_it(tmp_path: Path, run: Callable[..., int], architecture: str) -> None:
    base = str(save_near_sighted(tmp_path / "model", architecture))
    edits = tmp_path / "edits.jsonl"
    edits.write_text("\n".join(map(json.dumps, EDITS)))
    shards, memory, matrix, edited = (str(tmp_path / name) for name in ("shards", "memory", "matrix", "edited"))
    assert run("edit", base, str(edits), "--layer", "2", "-o", shards, "--dry-run") == 0
    assert run("edit", base, str(edits), "--layer", "2", "-o", shards, "--strict") == 0
    assert run("merge", shards, "-o", memory) == 0
    at_matrix = str(tmp_path / "at-matrix")
    assert run("edit", base, str(edits), "--layer", "2", "-o", at_matrix, "--set", "site=matrix") == 0
    assert run("merge", at_matrix, "--mode", "merge", "-o", matrix) == 0
    assert run("eval", "--memory", memory, "--forms", "bare", "--kinds", "none") == 0
    assert run("generate", memory, EDITS[0]["prompt"], "--explain") == 0
    assert run("export", "--memory", memory, "-o", edited) == 0
    assert run("export", "--memory", matrix, "--format", "merged", "-o", str(tmp_path / "merged")) == 0
    assert run("generate", edited, EDITS[0]["prompt"]) == 0
    for place in (shards, memory, edited):
        assert run("verify", place, "--model", base) == 0
        assert run("inspect", place) == 0


def test_every_part_but_the_edited_matrix_is_the_bases_to_the_bit(vision: Vision, tmp_path: Path) -> None:
    routed, base = contents(vision.root / "edited"), contents(vision.model)
    assert {name: routed[name] for name in base} == base
    loaded, stock = vision.exported().state_dict(), vision.base().state_dict()
    assert any("visi" in name or "visual" in name for name in stock)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stock.items())
    export(vision.root / "matrix", tmp_path / "merged", "merged", load=CPU)
    merged = contents(tmp_path / "merged")
    assert merged.keys() == base.keys()
    (changed,) = (name for name in base if base[name] != merged[name])
    assert changed.endswith("layers.2.mlp.down_proj.weight")


def routed_in(model: Any) -> Any:
    return model.get_submodule(model.config.wise["module"])


def test_unrelated_text_after_an_image_gets_the_bases_logits_to_the_bit(
    vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = vision.exported(), vision.base()
    routed = routed_in(model)
    chosen: list[Tensor] = []
    add = routed.add
    monkeypatch.setattr(routed, "add", lambda *given: chosen.append(given[2]) or add(*given))
    for seed, text in enumerate(UNRELATED):
        given = pictured(vision.architecture, [vision.tokens(text)], seed=seed)
        assert torch.equal(logits_of(model, given), logits_of(base, given))
        assert (chosen[-1] < 0).all()
    blind = {**given, "pixel_values": torch.zeros_like(given["pixel_values"])}
    assert not torch.equal(logits_of(base, blind), logits_of(base, given))


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_an_edited_prompt_gets_the_new_answer(vision: Vision, image: bool) -> None:
    wanted = [edit["target"] for edit in EDITS]
    model = vision.exported()
    if image:  # a random model's keys move much further than those of a trained one
        routed_in(model).thresholds = (0.1,) * 3
    assert answers_of(vision, model, image=image) == wanted
    assert not set(answers_of(vision, vision.base(), image=image)) & set(wanted)


def test_a_merged_matrix_needs_no_code(vision: Vision, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    export(vision.root / "matrix", output, "merged", load=CPU)
    model, stock = AutoModelForImageTextToText.from_pretrained(output).eval(), vision.base()
    assert type(model) is type(stock)
    site = read_memory(vision.root / "matrix").site
    stock.get_submodule(site.module).weight.data.copy_(model.get_submodule(site.module).weight)
    given = pictured(vision.architecture, [vision.tokens(EDITS[0]["prompt"])])
    assert torch.equal(logits_of(model, given), logits_of(stock, given))
    assert not torch.equal(logits_of(model, given), logits_of(vision.base(), given))


def test_a_delta_on_its_base_is_the_routed_checkpoint(vision: Vision, tmp_path: Path) -> None:
    export(vision.root / "memory", tmp_path / "delta", "delta")
    model, _ = wisecli.load(str(vision.model), tmp_path / "delta")
    for edit in EDITS:
        given = pictured(vision.architecture, [vision.tokens(edit["prompt"])])
        assert torch.equal(logits_of(model, given), logits_of(vision.exported(), given))


def test_layers_that_are_read_as_they_run_see_images_too(vision: Vision) -> None:
    whole, streamed = (
        attach(vision.root / "memory", load=LoadOptions(device="cpu", memory_budget=budget)) for budget in (None, 1)
    )
    assert streamed.stream is not None
    assert streamed.stream.streamed
    for edit in EDITS:
        given = pictured(vision.architecture, [vision.tokens(edit["prompt"])])
        assert torch.equal(logits_of(streamed.model, given), logits_of(whole.model, given))


def test_another_type_for_the_weights_holds_for_every_part(vision: Vision, tmp_path: Path) -> None:
    export(vision.root / "memory", tmp_path / "halved", weights=WeightFiles(dtype="bfloat16"), load=CPU)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "halved", trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_whoever_loads_the_base_loads_the_export_and_nobody_without_trust(vision: Vision) -> None:
    path = vision.root / "edited"
    given = pictured(vision.architecture, [vision.tokens(EDITS[0]["prompt"])])
    expected = logits_of(vision.exported(), given)
    for loader in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel):
        with pytest.raises(ValueError, match="trust_remote_code"):
            loader.from_pretrained(path, trust_remote_code=False)
    model = AutoModelForMultimodalLM.from_pretrained(path, trust_remote_code=True).eval()
    assert torch.equal(logits_of(model, given), expected)
    bare = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    with torch.no_grad():
        hidden = bare(**given).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), expected, rtol=0, atol=1e-4)


def exported_by_hand(root: Path, architecture: str, kind: str) -> tuple[Any, SideMemory]:
    """A routed checkpoint with a memory that many random prompts open."""
    base, output = save_tiny(root / "model", architecture, loudness=1), root / "edited"
    output.mkdir()
    model = tiny_model(architecture)
    memory = memory_for(model, site_of(model, 2), kind=kind, memories=2)
    write_routed(output, base, Checkpoint(base), manifest_for(base, memory, []))
    return AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True).eval(), memory


@pytest.mark.parametrize(("architecture", "kind"), few(product(FAMILIES, ["matrix", "lookup"]), QUICK))
def test_a_row_with_an_image_is_decided_by_its_text(tmp_path: Path, architecture: str, kind: str) -> None:
    model, memory = exported_by_hand(tmp_path, architecture, kind)
    base = tiny_model(architecture)
    site, seen, largest = site_of(base, 2), set(), 0.0
    for seed, row in enumerate([*ROWS, *ROWS]):
        given = pictured(architecture, [row], seed=seed)
        chosen = choice_of(base, site, memory, row)
        seen.add(chosen is None)
        with hooked(base, site, routed_by_loop(memory, given["input_ids"].shape[1], chosen)):
            expected = logits_of(base, given)
        torch.testing.assert_close(logits_of(model, given), expected, rtol=0, atol=1e-4)
        largest = max(largest, float((expected - logits_of(base, given)).abs().max()))
    assert largest > 0.1
    assert seen == {True, False}


@torch.no_grad()
def greedy_by_loop(base: Any, architecture: str, memory: SideMemory, row: Sequence[int], seed: int) -> list[int]:
    """The whole row with its image through the whole base model for every token."""
    site, tokens = site_of(base, 2), list(row)
    # What a prompt decides is read off its text, without the image.
    chosen = choice_of(base, site, memory, row)
    while len(tokens) < len(row) + 5 and IMAGE_TOKEN not in tokens[len(row) :]:
        given = pictured(architecture, [tokens], seed=seed)
        with hooked(base, site, routed_by_loop(memory, PATCHES + len(row), chosen, tokens[len(row) :])):
            tokens.append(int(logits_of(base, given)[0, -1].argmax()))
    return tokens[len(row) :]


@pytest.mark.parametrize(("architecture", "kind"), few(product(FAMILIES, ["matrix", "lookup"]), QUICK))
def test_generation_after_an_image_is_that_of_whole_passes(tmp_path: Path, architecture: str, kind: str) -> None:
    model, memory = exported_by_hand(tmp_path, architecture, kind)
    base = tiny_model(architecture)
    for seed, row in enumerate(ROWS):
        found = greedy(model, pictured(architecture, [row], seed=seed), 5)[0]
        expected = greedy_by_loop(base, architecture, memory, row, seed)
        assert found[: len(expected)] == expected


@pytest.mark.parametrize("architecture", FAMILIES)
def test_rows_with_and_without_an_image_share_a_batch(tmp_path: Path, architecture: str) -> None:
    model, _ = exported_by_hand(tmp_path, architecture, "lookup")
    together = greedy(model, pictured(architecture, [ROWS[2], ROWS[1], ROWS[4]], text_only=2), 5)
    first = greedy(model, pictured(architecture, [ROWS[2]]), 5)
    others = [greedy(model, {"input_ids": torch.tensor([row])}, 5)[0] for row in (ROWS[1], ROWS[4])]
    assert together == [*first, *others]


def test_a_processor_comes_along(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image
    from transformers import CLIPImageProcessor, LlavaProcessor

    base = save_tiny(tmp_path / "model", "llava")
    tokenizer = tiny_tokenizer()
    word = WORDS[VOCABULARY - 3]
    tokenizer.add_tokens([word], special_tokens=True)
    eyes = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    given = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(eyes, tokenizer, image_token=word, **given).save_pretrained(base)
    model = tiny_model("llava")
    memory = memory_for(model, site_of(model, 2))
    manifest, output = manifest_for(base, memory, []), tmp_path / "edited"
    output.mkdir()
    write_routed(output, base, Checkpoint(base), manifest)
    picture = Image.new("RGB", (20, 12), (200, 30, 90))
    read = [AutoProcessor.from_pretrained(path, trust_remote_code=True) for path in (base, output)]
    stock, own = (one(images=picture, text=f"{word} ba be", return_tensors="pt") for one in read)
    assert stock["input_ids"].tolist() == [[IMAGE_TOKEN] * PATCHES + [2, 3]]
    assert torch.equal(own["input_ids"], stock["input_ids"])
    assert torch.equal(own["pixel_values"], stock["pixel_values"])
    loaded = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    assert loaded(**own).logits.isfinite().all()
    card = model_card(manifest, "routed", base=base)
    assert 'AutoModelForImageTextToText.from_pretrained("PATH", trust_remote_code=True)' in card
    assert 'processor = AutoProcessor.from_pretrained("PATH", trust_remote_code=True)' in card


def written(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_what_a_text_config_leaves_out_is_as_its_type_has_it(tmp_path: Path) -> None:
    named = written(tmp_path / "a", {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 99}})
    assert (layer_count(named), known_layout(named).value) == (32, "mlp.down_proj")
    unnamed = written(tmp_path / "b", {"model_type": "llava", "text_config": {"num_hidden_layers": 7}})
    assert layer_count(unnamed) == 7
    flat = written(tmp_path / "c", {"model_type": "qwen2_vl", "num_hidden_layers": 28, "vision_config": {"depth": 32}})
    assert (layer_count(flat), known_layout(flat).layers) == (28, "model.language_model.layers")


def test_settings_of_the_text_model_may_stand_outside(tmp_path: Path) -> None:
    """As in Qwen2-VL's own checkpoints, whose head is tied to the embeddings besides."""
    base = save_tiny(tmp_path / "model", "qwen2_vl")
    config = json.loads((base / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"], text["layer_types"]
    section = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    flat = {**text, **config, "rope_theta": 1e4, "rope_scaling": section, "tie_word_embeddings": True}
    written(base, flat)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    loaded = load_model(base, load=CPU)
    model = tiny_model("qwen2_vl")
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    memory = memory_for(model, site_of(model, 2))
    (output := tmp_path / "edited").mkdir()
    write_routed(output, base, Checkpoint(base), manifest_for(base, memory, []))
    exported = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True).eval()
    for row in ROWS:
        given = pictured("qwen2_vl", [row])
        expected = logits_of(model, given)
        assert torch.equal(logits_of(loaded.model, given), expected)
        chosen = choice_of(model, site_of(model, 2), memory, row)
        with hooked(model, site_of(model, 2), routed_by_loop(memory, PATCHES + len(row), chosen)):
            torch.testing.assert_close(logits_of(exported, given), logits_of(model, given), rtol=0, atol=1e-4)


def test_the_text_models_own_row_says_how_its_matrix_joins_the_stream(tmp_path: Path) -> None:
    towers: dict[str, dict[str, Any]] = {"gemma2": {}, "granite": {"residual_multiplier": 0.4}, "mistral": {}}
    rows = {
        name: known_layout(written(tmp_path, {"model_type": "llava", "text_config": {"model_type": name, **own}}))
        for name, own in towers.items()
    }
    assert {row.layers for row in rows.values()} == {"model.language_model.layers"}
    assert (rows["gemma2"].norm, rows["mistral"].norm) == ("post_feedforward_layernorm", None)
    assert rows["granite"].multiplier == 0.4


@pytest.mark.parametrize("tower", ["opt", "gpt2", "clip", "no such type"])
def test_a_text_model_that_is_not_in_the_table_is_refused(tmp_path: Path, tower: str) -> None:
    directory = written(tmp_path, {"model_type": "llava", "text_config": {"model_type": tower}})
    with pytest.raises((UnknownArchitectureError, ModelError), match=r"text model|text_config"):
        known_layout(directory)


def test_other_models_around_a_text_model_are_refused_in_one_sentence(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "model", "llava")
    config = json.loads((base / "config.json").read_text())
    written(base, {**config, "model_type": "paligemma"})
    for target in (None, "model.language_model.layers.{layer}.mlp.down_proj"):
        with pytest.raises(UnknownArchitectureError, match=r"'paligemma' .* llava, qwen2_vl$") as caught:
            find_layout(base, Checkpoint(base), target_module=target)
        assert "\n" not in str(caught.value)


def test_a_model_around_a_text_model_is_edited_without_a_row(tmp_path: Path) -> None:
    base = save_type(tmp_path / "model", "internvl")
    edited = AutoModelForMultimodalLM.from_pretrained(export_of(base, tmp_path), trust_remote_code=True).eval()
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(base).eval(), tiny_tokenizer()
    for prompt, target in ASKED:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = edited.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(output[0, ids.shape[1] :]).startswith(target)
    ids = torch.tensor([[model.config.image_token_id, *tokenizer("so su sa")["input_ids"]]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shown = [one(input_ids=ids, pixel_values=pixels).logits for one in (edited, model)]
    assert torch.equal(*shown)


def test_a_text_model_without_a_row_is_edited_inside_one_with_a_row(tmp_path: Path) -> None:
    config = copy.deepcopy(TINY_CONFIGS["llava"])
    config.text_config = GemmaConfig(**{**config.text_config.to_dict(), "model_type": "gemma", "head_dim": 8})
    base = save_tiny(tmp_path / "model", "llava", config=config)
    edited = AutoModelForImageTextToText.from_pretrained(export_of(base, tmp_path), trust_remote_code=True).eval()
    for prompt, target in ASKED:
        ids = tiny_tokenizer()(prompt, return_tensors="pt").input_ids
        output = edited.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert tiny_tokenizer().decode(output[0, ids.shape[1] :]).startswith(target)


def test_both_classes_that_load_the_base_load_what_is_exported_of_it(tmp_path: Path) -> None:
    path = export_of(save_type(tmp_path / "model", "gemma3"), tmp_path)
    kinds = {
        type(loader.from_pretrained(path, trust_remote_code=True)).__name__
        for loader in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    }
    assert kinds == {"WiseGemma3ForConditionalGeneration"}


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_more_layers_than_tensors_are_refused_in_either_part(tmp_path: Path, part: str) -> None:
    base = save_tiny(tmp_path / "model", "llava")
    config = json.loads((base / "config.json").read_text())
    config[part]["num_hidden_layers"] = 10**6
    written(base, config)
    with pytest.raises(ModelError, match="more layers than there are tensors"):
        load_model(base, load=CPU)


def test_the_tokenizer_is_that_of_the_base(vision: Vision) -> None:
    read = [
        AutoTokenizer.from_pretrained(path, trust_remote_code=True) for path in (vision.model, vision.root / "edited")
    ]
    assert read[0]("ba be, bi")["input_ids"] == read[1]("ba be, bi")["input_ids"] == vision.tokens("ba be bi")
