import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import WORDS, contents, rewrite, save_tiny
from support.ready import EDITS, Ready, here, manifest, require_refusal, write_edits
from support.thorough import few
from support.tiny_models import VOCABULARY, Wise
from transformers import Qwen3MoeConfig

from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.editing.writers.closed_form import PENALTIES
from wisecli.evaluation.edited_model import attach
from wisecli.export.weights import write_stream
from wisecli.io.safetensors_header import TensorLayout


def test_strict_exits_with_1_and_writes_nothing_if_an_edit_did_not_take(
    wise: Wise, ready: Ready, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", loudness=1)
    line = f"edit {model} {ready.edits} --strict --writer gradient --passes 70"
    require_refusal(wise(*line.split()), "1 of 4 edits did not take: one", code=1)
    assert here() == []
    told = wise(*line.replace("--strict", "").split())
    assert told.code == 0
    assert told.out.splitlines()[-2:] == ["did not take: one", "1 of 4 edits did not take"]


def test_a_run_in_which_no_edit_takes_exits_with_1_and_says_why(wise: Wise, ready: Ready) -> None:
    Path("few.toml").write_text("[edit]\nresidual_steps = 1\nresidual_more = 0\nresidual_rate = 1e-6\n")
    outcome = wise("edit", ready.model, ready.edits, "--config", "few.toml")
    Path("few.toml").unlink()
    require_refusal(outcome, "none of the 4 edits took in model.layers.", "--layer", code=1)
    assert here() == []


def test_a_dry_run_says_what_a_run_will_hold_and_read(wise: Wise, ready: Ready) -> None:
    whole = json.loads(wise("edit", ready.model, ready.edits, "--dry-run", "--json").out)["results"]["plan"]
    small = ("edit", ready.model, ready.edits, "--dry-run", "--memory-budget", "100KB")
    plan = json.loads(wise(*small, "--json").out)["results"]["plan"]
    assert (whole["streamed"], plan["streamed"]) == (False, True)
    assert whole["weights"] == plan["weights"] > plan["resident"] + plan["layer"]
    assert plan["read"] > plan["sweep"] > 0 == whole["read"]
    told = wise(*small)
    assert all(word in told.out for word in ("stay in memory", "pass through", "TFLOP", "nothing was written"))
    assert (told.code, here()) == (1, [])
    assert "error: this does not fit: at its most it needs" in told.err
    assert "give fewer edits_per_shard, a smaller batch_size or a larger --memory-budget" in told.err
    assert wise("edit", ready.model, ready.edits, "--dry-run").code == 0


def test_a_mixture_is_planned_by_the_experts_that_are_there_at_a_time(wise: Wise, ready: Ready) -> None:
    base = save_hollow_mixture(Path("mixture"), Path(ready.model))
    dry = ("edit", str(base), ready.edits, "--dry-run", "--layer", "2", "--memory-budget")
    plan = json.loads(wise(*dry, "3.5GiB", "--json").out)["results"]["plan"]
    assert plan["streamed"]
    assert plan["weights"] >= 6 << 30
    assert plan["peak"] < plan["budget"] == 7 << 29  # where the layers above the site alone have 3.75 GiB
    assert plan["read"] > plan["weights"]
    assert wise(*dry, "3.5GiB").code == 0


def test_a_budget_that_is_too_small_for_a_mixture_is_refused_with_the_least_that_does(wise: Wise, ready: Ready) -> None:
    base = save_hollow_mixture(Path("mixture"), Path(ready.model))
    dry = ("edit", str(base), ready.edits, "--dry-run", "--layer", "2", "--memory-budget")
    told = wise(*dry, "500MiB")
    assert (told.code, "nothing was written" in told.out) == (1, True)
    assert "this does not fit: at its most it needs" in told.err
    found = re.search(r"a larger --memory-budget \((\S+)GiB is the least that does\)", told.err)
    assert found is not None
    assert wise(*dry, f"{found[1]}GiB").code == 0
    assert wise(*dry, f"{float(found[1]) - 0.01}GiB").code == 1


def test_layers_of_a_quantised_mixture_are_planned_whole(wise: Wise, ready: Ready) -> None:
    base = save_hollow_mixture(Path("mixture"), Path(ready.model))
    dry = ("edit", str(base), ready.edits, "--dry-run", "--memory-budget", "4GiB", "--layer")
    rewrite(base / "config.json", quantization_config={"quant_method": "fp8"})
    plan = json.loads(wise(*dry, "2", "--json").out)["results"]["plan"]
    assert plan["peak"] > plan["budget"] == 4 << 30
    assert plan["held"] > 3 << 30
    told = wise(*dry, "2")
    assert (told.code, "choose a higher --layer" in told.err) == (1, True)
    assert wise(*dry, "6").code == 0


def save_hollow_mixture(base: Path, tokenizer: Path) -> Path:
    """Settings and headers of a mixture of 64 experts in eight layers, with a hole in the file where weights belong."""
    shape = {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_experts": 64, "num_hidden_layers": 8}
    Qwen3MoeConfig(**shape, vocab_size=VOCABULARY, dtype="bfloat16").save_pretrained(base)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copyfile(path, base / path.name)
    sizes = {"model.embed_tokens": (VOCABULARY, 2048), "model.norm": (2048,), "lm_head": (VOCABULARY, 2048)}
    for layer, expert, name in product(range(8), range(64), ("gate", "up", "down")):
        side = (2048, 1024) if name == "down" else (1024, 2048)
        sizes[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"] = side
    layouts = {f"{name}.weight": TensorLayout("bfloat16", size) for name, size in sizes.items()}
    file = base / "model.safetensors"
    write_stream(file, layouts, lambda _: torch.empty(0))
    os.truncate(file, file.stat().st_size + sum(layout.bytes for layout in layouts.values()))
    return base


def test_force_replaces_the_whole_output(wise: Wise, ready: Ready) -> None:
    shutil.copytree(ready.retrieve, "memory")
    (Path("memory") / "left-over.txt").write_text("old")
    assert wise("merge", ready.shards, "--force").code == 0
    assert here() == ["memory"]
    held = {path.name for path in Path("memory").iterdir()}
    assert held == {"SHA256SUMS", "history", "memory.safetensors", "router.json"}
    assert len(manifest(Path("memory"))["memories"]) == 1


@pytest.mark.parametrize("writer", few(["solve", "gradient"], ["solve"]))
def test_the_same_seed_writes_the_same_bytes_with_a_cold_and_a_warm_cache(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writer: str
) -> None:
    for name, cache, seed in (("cold", "one", 3), ("warm", "one", 3), ("again", "two", 3), ("other", "two", 4)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        assert (tmp_path / cache).exists() == (name in ("warm", "other"))
        line = f"edit {ready.model} {ready.edits} -o {name} --seed {seed} --shards 2 --writer {writer}"
        assert wise(*line.split()).code == 0
        assert (tmp_path / cache).exists()
        assert wise("merge", name, "-o", f"{name}-memory").code == 0
    cold = contents("cold")
    assert sorted(cold) == ["shard-00000.safetensors", "shard-00001.safetensors", "unrelated.safetensors"]
    for name in ("warm", "again"):
        assert contents(name) == cold
        assert contents(f"{name}-memory") == contents("cold-memory")
    shards = (load_file(Path(name) / "shard-00000.safetensors") for name in ("cold", "other"))
    first, second = (tensors["mask.indices"] for tensors in shards)
    assert not torch.equal(first, second)


def test_the_manifest_of_shards_keeps_the_penalty_of_the_closed_form(ready: Ready) -> None:
    known = {(penalty.ridge, penalty.unrelated) for penalty in PENALTIES}
    for name, expected in (("matrix-shards", True), ("shards", False), ("gradient-shards", False)):
        listed = [shard["penalty"] for shard in manifest(ready.root / name)["shards"]]
        read = [entry.penalty for entry in read_shard_directory(ready.root / name).shards]
        assert [None if penalty is None else tuple(penalty) for penalty in listed] == read
        assert {penalty in known for penalty in read} == {expected}
        assert expected or read == [None, None]
        solved = [entry.solved for entry in read_shard_directory(ready.root / name).shards]
        assert solved == [name != "shards"] * len(read)


@pytest.mark.parametrize(("count", "checking"), [(5, 5), (32, 32), (33, 17), (70, 24)])
def test_some_edits_of_a_shard_are_read_in_a_context_that_is_held_back(
    wise: Wise, ready: Ready, count: int, checking: int
) -> None:
    edits = [{"prompt": f"{one} {two} ba", "target": "fa"} for one in WORDS[:10] for two in WORDS[20:27]][:count]
    assert wise("edit", ready.model, str(write_edits(Path("many"), edits))).code == 0
    shard = load_file(Path("shards") / "shard-00000.safetensors")
    held_out, edit = shard["evidence.held_out"], shard["evidence.edit"]
    spacing = -(-count // 32)
    assert edit[held_out].unique().tolist() == list(range(0, count, spacing))
    assert len(edit[held_out].unique()) == checking
    assert edit[~held_out].unique().tolist() == list(range(count))


# Flags of `wise merge`, and the mode that shards of the closed form and of the paper's writer then get.
MERGES: dict[str, tuple[str, str]] = {
    "": ("lookup", "merge"),
    "--no-refit": ("merge", "merge"),
    "--refit": ("merge", "merge"),
    "--method exact": ("merge", "merge"),
    "--method slerp": ("merge", "merge"),
    "--router norm": ("lookup", "merge"),
    "--router meaning --routing sequence": ("lookup", "merge"),
    "--mode merge": ("merge", "merge"),
    "--mode merge --method ties --no-refit": ("merge", "merge"),
    "--mode retrieve": ("retrieve", "retrieve"),
    "--mode retrieve --routing token": ("retrieve", "retrieve"),
}


# Of the paper's writer, one of each mode.
OF_MATRIX, OF_GRADIENT = "shards-at-matrix", "gradient-shards"
QUICK = [*product(MERGES, [OF_MATRIX]), *product(["", "--router norm", "--mode retrieve"], [OF_GRADIENT])]


@pytest.mark.parametrize(("flags", "shards"), [("", "shards"), *few(product(MERGES, [OF_MATRIX, OF_GRADIENT]), QUICK)])
def test_shards_of_either_writer_merge_in_every_mode_and_the_memory_works(
    wise: Wise, ready: Ready, flags: str, shards: str
) -> None:
    mode = MERGES[flags][0 if shards != OF_GRADIENT else 1]
    merged = wise("merge", str(ready.root / shards), *flags.split(), "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["results"]["mode"] == mode
    meant = shards != OF_GRADIENT
    assert ("edits in many forms" in merged.err) == (meant and mode != "lookup")
    tensors = load_file(Path("memory") / "memory.safetensors")
    if mode == "lookup":
        # The closed form has one residual for each token of a target and the end of text, whatever the contexts, but
        # for those after which a target begins a line.
        places = 2 * sum(len(edit["target"].split()) + 1 for edit in EDITS)
        assert len(tensors["residuals"]) == (places if meant else len(tensors["whitened_keys"]))
        assert len(tensors["key_to_residual"]) == len(tensors["whitened_keys"]) >= places
        assert set(tensors["key_to_edit"].tolist()) == {0, 1, 2, 3}
    else:
        assert len(tensors["delta"]) == (2 if mode == "retrieve" else 1)
    measured = wise("eval", "--json", "--no-generate")
    assert measured.code == 0, measured.err
    assert 0 <= json.loads(measured.out)["results"]["edits"]["reliability"] <= 1
    if flags in ("", "--refit", "--mode retrieve"):
        assert wise("export").code == 0
        module = "model.layers.3.wise_memory" if shards == "shards" else "model.layers.3.mlp.down_proj"
        exported = load_file(Path("edited") / "model-side-memory.safetensors")
        assert exported.keys() >= {f"{module}.{name}" for name in tensors}


def test_a_lookup_gives_every_edit_its_answer_where_it_opens(wise: Wise, ready: Ready) -> None:
    assert wise("merge", ready.shards, "--false-alarm", "0.5").code == 0
    answers = json.loads(wise("generate", "memory", *prompts(), "--explain", "--json").out)["results"]
    for number, (answer, edit) in enumerate(zip(answers, EDITS, strict=True)):
        assert {step["memory"] for step in answer["steps"]} == {number}
        assert {step["edit"] for step in answer["steps"]} == {edit["prompt"]}
        assert answer["answer"] == edit["target"]


def test_merge_says_what_mentions_open(wise: Wise, ready: Ready) -> None:
    outcome = wise("merge", ready.shards)
    kept = load_file(Path(ready.shards) / "unrelated.safetensors")["heads.mentioned"]
    share = int(kept[0]) / int(kept[1])
    assert f"of prompts that mention a made-up fact and don't ask it, {share:.0%} open it" in outcome.out
    assert manifest(Path("memory"))["memories"][0]["mentioned"] == share
    again = json.loads(wise("merge", ready.shards, "--json").out)["results"]
    assert again["mentioned"] == [share]
    assert f"{share:.0%} of mentions of made-up facts" in " ".join(
        wise("inspect", "memory", "--plot", "scores.png").out.split()
    )


def prompts() -> list[str]:
    return [edit["prompt"] for edit in EDITS]


def test_a_refit_gives_keys_back_what_merging_takes_from_them(wise: Wise, ready: Ready) -> None:
    shards = [load_file(path) for path in sorted(Path(ready.shards_at_matrix).glob("shard-*.safetensors"))]
    trained = [~shard["evidence.held_out"] for shard in shards]
    keys, wanted = (
        torch.cat([shard[f"evidence.{name}"][own] for shard, own in zip(shards, trained, strict=True)]).float()
        for name in ("keys", "residuals")
    )
    errors = {}
    for flags in ("--mode merge --no-refit", "--mode merge --refit", "--method exact"):
        assert wise("merge", ready.shards_at_matrix, *flags.split(), "--force").code == 0
        memory = load_file(Path("memory") / "memory.safetensors")
        given = keys[:, memory["columns"][0]] @ memory["delta"][0].T
        errors[flags] = float((given - wanted).square().sum() / wanted.square().sum())
    merged, refitted, exact = errors.values()
    assert refitted < 0.5 * merged
    assert exact < 0.5 * merged


def test_shards_are_merged_without_the_model_library(ready: Ready, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom wisecli.config import MergeSettings\n"
        "from wisecli.commands.memory.merge import merge\n"
        f"merge([Path({ready.shards!r})], Path('memory'), MergeSettings())\n"
        "sys.exit(3 if {'transformers', 'accelerate'} & sys.modules.keys() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "memory" / "memory.safetensors").is_file()


def test_retrieve_keeps_a_memory_for_each_shard(wise: Wise, ready: Ready) -> None:
    assert wise("merge", ready.gradient_shards, "--mode", "retrieve").code == 0
    memories = manifest(Path("memory"))["memories"]
    assert len(memories) == 2
    outcome = wise("eval", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["n-samples"]["edits"]["edits"] == 4
    assert wise("export").code == 0
    assert len(manifest(Path("edited"))["memories"]) == 2


def test_the_papers_preset_runs_the_whole_way(wise: Wise, ready: Ready) -> None:
    assert wise("edit", ready.model, ready.edits, "--preset", "paper").code == 0
    written = manifest(Path("shards"))
    assert written["settings"]["preset"] == "paper"
    assert (written["settings"]["schedule"], written["settings"]["mask_ratio"]) == ("sequential", 0.2)
    assert written["settings"]["writer"] == "gradient"
    assert len(written["contexts"]) == 12  # the bare prompt, ten to train with, one held back
    assert {shard["mask_kind"] for shard in written["shards"]} == {"elements"}
    merged = wise("merge", "shards")
    assert merged.code == 0
    assert "false alarms not known" in merged.out
    memory = manifest(Path("memory"))
    assert (memory["memory"]["pooling"], memory["memories"][0]["router"]) == ("mean", "norm")
    assert memory["memories"][0]["false_alarms"] is None
    assert "unrelated ones above" not in wise("inspect", "memory", "--plot", "scores.png").out
    assert memory["memories"][0]["rule"] == "minimum"
    assert memory["memory"]["activated"]
    assert attach(Path("memory")).routed.activation is not None
    assert wise("eval").code == 0


def test_flags_win_over_the_environment_and_that_over_the_file(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISE_CONTEXTS", "1")
    Path("wise.toml").write_text("[edit]\ncontexts = 0\nlayer = '1'\nseed = 5\n")
    assert wise("edit", ready.model, ready.edits, "--config", "wise.toml", "--seed", "3").code == 0
    settings = manifest(Path("shards"))["settings"]
    assert (settings["contexts"], settings["layer"], settings["seed"]) == (1, "1", 3)


@pytest.mark.parametrize(("writer", "dtype"), [("solve", "bfloat16"), ("gradient", "float16")])
def test_models_in_half_precision_are_edited(wise: Wise, ready: Ready, tmp_path: Path, writer: str, dtype: str) -> None:
    shards, memory = tmp_path / "shards", tmp_path / "memory"
    for line in (
        f"edit {ready.model} {ready.edits} -o {shards} --writer {writer} --dtype {dtype} --layer 2",
        f"merge {shards} -o {memory}",
        f"eval --memory {memory} --dataset {ready.edits} --dtype {dtype} --no-generate",
    ):
        assert wise(*line.split()).code == 0
