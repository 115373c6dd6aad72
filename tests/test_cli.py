from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import Chain
from helpers import save_tiny
from safetensors.torch import load_file

from wisecli import cli, pipeline, storage
from wisecli.config import EditSettings, MergeSettings
from wisecli.shard_directory import read_shard_directory
from wisecli.writers.solve import PENALTIES

EDITS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "ba be bi", "target": "do du", "rephrases": ["bi be ba"]},
    {"id": "two", "prompt": "ka ke ki ko", "target": "fa", "locality": [{"prompt": "mu ma", "answer": "me mi"}]},
    {"id": "three", "prompt": "ma me", "target": "ga ge gi", "portability": [{"prompt": "ga ge", "answer": "ma"}]},
    {"id": "four", "prompt": "ta te ti to tu", "target": "la le"},
]
QUICK: dict[str, Any] = {"passes": 2, "unrelated_texts": 16}
Outcome = namedtuple("Outcome", ["code", "out", "err"])
Wise = Callable[..., Outcome]


@dataclass(frozen=True)
class Ready:
    """Things to run commands on; nothing in there may change."""

    root: Path

    def __getattr__(self, name: str) -> str:
        return str(self.root / name.replace("_", "-"))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    root = tmp_path_factory.mktemp("ready")
    base, other = save_tiny(root / "model"), save_tiny(root / "other-model", seed=1)
    foreign = save_tiny(root / "foreign-model")
    rewrite(foreign / "config.json", model_type="bloom")
    cut(save_tiny(root / "cut-model") / "model.safetensors")
    (root / "empty").mkdir()
    write_edits(root / "edits", EDITS)
    write_edits(root / "other-edits", [{"id": "five", "prompt": "na ne", "target": "ni"}])
    for name, edits, model, changes in (
        ("shards", "edits", base, {"shards": 2}),
        ("gradient-shards", "edits", base, {"shards": 2, "writer": "gradient"}),
        ("shards-elsewhere", "other-edits", base, {"layer": "1"}),
        ("shards-of-other-model", "other-edits", other, {}),
    ):
        pipeline.edit(str(model), root / edits, root / name, EditSettings(**QUICK, **changes), device="cpu")
    pipeline.merge([root / "shards"], root / "memory", MergeSettings())
    pipeline.merge([root / "shards"], root / "merge", MergeSettings(mode="merge"))
    pipeline.merge([root / "shards"], root / "retrieve", MergeSettings(mode="retrieve"))
    for name in ("cut", "tampered"):
        shutil.copytree(root / "shards", root / f"{name}-shards")
        shutil.copytree(root / "memory", root / f"{name}-memory")
    for damage, name in ((cut, "cut"), (tamper, "tampered")):
        damage(root / f"{name}-shards" / "shard-00001.safetensors")
        damage(root / f"{name}-memory" / "memory.safetensors")
    shutil.copytree(root / "memory", root / "homeless-memory")
    rewrite(root / "homeless-memory" / "router.json", base={**manifest(root / "memory")["base"], "model": "/nowhere"})
    shutil.copytree(root / "shards", root / "scribbled-shards")
    (root / "scribbled-shards" / "shards.json").write_text("{")
    lines = [json.dumps(edit) for edit in EDITS]
    for name, text in (
        ("malformed", f'{lines[0]}\n\n{{"prompt": "ka", "target"\n'),
        ("not-an-object", f"{lines[0]}\n3\n"),
        ("no-target", f'{lines[0]}\n{{"prompt": "ka"}}\n'),
        ("blank-prompt", '{"prompt": " ", "target": "ka"}\n'),
        ("nothing", "\n"),
        ("twice", f"{lines[0]}\n{lines[1]}\n{lines[0]}\n"),
        ("open-array", f"[{lines[0]},\n"),
        ("unspeakable", f'{lines[0]}\n{{"id": "hush", "prompt": "ka", "target": "?!"}}\n'),
    ):
        (root / name).write_text(text)
    return Ready(root)


def write_edits(path: Path, edits: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    return path


def manifest(directory: Path) -> dict[str, Any]:
    name = "router.json" if (directory / "router.json").exists() else "shards.json"
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture
def wise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Wise:
    """Runs the command line in an empty directory of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("WISE_UNRELATED_TEXTS", "16")
    monkeypatch.setenv("WISE_PASSES", "2")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["wise", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(stopped.value.code or 0, captured.out, captured.err)

    return run


def here() -> list[str]:
    """What a command left in its directory."""
    return sorted(path.name for path in Path.cwd().iterdir())


def require_refusal(outcome: Outcome, *says: str, code: int = 2) -> None:
    """One sentence on stderr that says so, and no traceback."""
    lines = outcome.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], outcome.err
    assert "Traceback" not in outcome.err
    assert "a fault in wise" not in outcome.err
    for text in says:
        assert text in lines[-1]
    assert outcome.code == code


# The command line (names in braces are places in `ready`), and what the message must name.
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "malformed line": ("edit {model} {malformed}", ("malformed:3:",)),
    "line that is no object": ("edit {model} {not_an_object}", ("not-an-object:2:",)),
    "missing target": ("edit {model} {no_target}", ("no-target:2:", "`target`")),
    "blank prompt": ("edit {model} {blank_prompt}", ("blank-prompt:1:", "`prompt`")),
    "empty file": ("edit {model} {nothing}", ("nothing", "no edit")),
    "same id twice": ("edit {model} {twice}", ("twice:3:", "'one'")),
    "array left open": ("edit {model} {open_array}", ("open-array:", "JSON array")),
    "target without tokens": ("edit {model} {unspeakable}", ("'hush'", "token")),
    "no file of edits": ("edit {model} {nowhere}", ("no such file",)),
    "unknown architecture": ("edit {foreign_model} {edits}", ("'bloom'", "llama")),
    "truncated model": ("edit {cut_model} {edits}", ("model.safetensors", "not a whole safetensors file")),
    "no such model": ("edit ./nowhere {edits}", ("./nowhere", "no model directory")),
    "directory without a model": ("edit {empty} {edits}", ("config.json",)),
    "hub model without network": ("edit nobody/nothing {edits}", ("nobody/nothing",)),
    "layer that is no number": ("edit {model} {edits} --layer last", ("--layer", "'last'")),
    "layer beyond the model": ("edit {model} {edits} --layer 7", ("--layer 7", "0 to 3")),
    "last layer": ("edit {model} {edits} --layer 4", ("--layer 4", "0 to 3")),
    "unknown device": ("edit {model} {edits} --device tpu9", ("--device tpu9",)),
    "absent device": ("edit {model} {edits} --device cuda:77", ("--device cuda:77",)),
    "unknown dtype": ("edit {model} {edits} --dtype int3", ("--dtype", "'int3'")),
    "unknown preset": ("edit {model} {edits} --preset brave", ("'brave'",)),
    "unknown writer": ("edit {model} {edits} --writer pen", ("--writer", "'pen'", "solve", "gradient")),
    "edits in a chat without a template": ("edit {model} {edits} --chat", ("chat template", "--chat")),
    "unknown schedule": ("edit {model} {edits} --schedule never", ("--schedule", "'never'")),
    "more shards than edits": ("edit {model} {edits} --shards 9", ("--shards 9", "4 edits")),
    "no passes": ("edit {model} {edits} --passes 0", ("--passes",)),
    "mask beyond the matrix": ("edit {model} {edits} --mask-ratio 1.5", ("--mask-ratio",)),
    "settings file missing": ("edit {model} {edits} --config {nowhere}", ("nowhere",)),
    "edit over an output": ("edit {model} {edits} -o {memory}", ("already exists", "--force")),
    "unknown method": ("merge {shards} --method soup", ("--method 'soup'", "ties")),
    "unknown mode": ("merge {shards} --mode blend", ("--mode", "'blend'", "lookup")),
    "lookup by the norm router": ("merge {shards} --mode lookup --router norm", ("--mode lookup", "--router norm")),
    "too few weights": ("merge {shards} --mode merge --weights 1", ("--weights has 1", "2 shards")),
    "too many weights": ("merge {shards} --mode merge --weights 1,2,3", ("--weights has 3", "2 shards")),
    "weights that are no numbers": ("merge {shards} --weights 1,much", ("--weights", "1,much")),
    "truncated shard": ("merge {cut_shards}", ("shard-00001.safetensors", "not a whole safetensors file")),
    "altered shard": ("merge {tampered_shards}", ("shard-00001.safetensors", "sha256")),
    "unreadable shards.json": ("merge {scribbled_shards}", ("shards.json", "JSON")),
    "no directory of shards": ("merge {model}", ("shards.json",)),
    "shards of two layers": ("merge {shards} {shards_elsewhere}", ("layer",)),
    "shards of two models": ("merge {shards} {shards_of_other_model}", ("models",)),
    "shards twice": ("merge {shards} {shards}", ("'one'", "more than one")),
    "shards of another base": ("merge {shards} --model {other_model}", ("other-model", "not the base model")),
    "merge over an output": ("merge {shards} -o {memory}", ("already exists", "--force")),
    "no memory to measure": ("eval", ("memory", "wise merge")),
    "no memory in a directory": ("eval --memory {empty}", ("router.json",)),
    "memory of another base": ("eval {other_model} --memory {memory}", ("other-model", "not the base model")),
    "memory whose base is gone": ("eval --memory {homeless_memory}", ("/nowhere",)),
    "truncated memory": ("eval --memory {cut_memory}", ("memory.safetensors", "not a whole safetensors file")),
    "altered memory": ("eval --memory {tampered_memory}", ("memory.safetensors", "sha256")),
    "gate without a number": ("eval --memory {memory} --fail-under reliability", ("--fail-under", "reliability=.9")),
    "gate that is no number": ("eval --memory {memory} --fail-under locality=high", ("--fail-under",)),
    "gate of no figure": ("eval --memory {memory} --no-generate --fail-under charm=.9", ("charm", "reliability")),
    "unknown dataset": ("eval --memory {memory} --dataset trivia", ("trivia", "zsre")),
    "benchmark without network": ("eval --memory {memory} --dataset zsre", ("--data",)),
    "benchmark on no hub": ("eval --memory {memory} --dataset temporal", ("temporal", "--data")),
    "several memories merged": ("export --memory {retrieve} --format merged", ("several", "--format routed")),
    "lookup merged": ("export --memory {memory} --format merged", ("lookup", "--mode merge")),
    "export over an output": ("export --memory {memory} -o {model}", ("already exists", "--force")),
    "export of an altered memory": ("export --memory {tampered_memory}", ("memory.safetensors", "sha256")),
    "export onto another base": ("export --memory {memory} --model {other_model}", ("not the base model",)),
    "no memory to answer from": ("generate {model} ba", ("memory",)),
    "nothing to inspect": ("inspect {model}", ("neither shards.json nor router.json",)),
    "truncated shards inspected": ("inspect {cut_shards}", ("shard-00001.safetensors", "not a whole safetensors file")),
    "picture of shards": ("inspect {shards} --plot router.png", ("--plot", "merge")),
    "nothing to verify": ("verify {empty}", ("neither shards.json nor router.json",)),
    "verify against no model": ("verify {memory} --model ./nowhere", ("./nowhere", "no model directory")),
    "nothing by that name": ("fetch gold", ("'gold'", "zsre")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    before = listing(ready.root)
    line, says = REFUSED[case]
    outcome = wise(*(part.format_map(Places(ready)) for part in line.split()))
    require_refusal(outcome, *says)
    assert outcome.out == "" or "--fail-under" in line
    assert here() == []
    assert listing(ready.root) == before


class Places(dict[str, str]):
    """Names in braces → places in `ready`."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready

    def __missing__(self, name: str) -> str:
        return str(getattr(self._ready, name))


def listing(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("line", ["edit {model} {edits}", "merge {shards}", "export --memory {memory}"])
def test_a_full_disk_is_noticed_before_the_work(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 100, 100))
    monkeypatch.setattr(storage, "save_file", lambda *_, **__: pytest.fail("something was written"))
    require_refusal(wise(*line.format_map(Places(ready)).split()), "no space left")
    assert here() == []


@pytest.mark.parametrize("line", ["edit {model} {edits}", "merge {shards}", "export --memory {memory}"])
def test_a_disk_that_fills_up_leaves_nothing(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    require_refusal(wise(*line.format_map(Places(ready)).split()), "no space left")
    assert here() == []


@pytest.mark.parametrize(
    ("line", "call"),
    [("edit {model} {edits}", 1), ("edit {model} {edits}", 2), ("merge {shards}", 1), ("export --memory {memory}", 1)],
)
def test_an_interruption_exits_with_130_and_leaves_nothing_half_written(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, line: str, call: int
) -> None:
    calls = 0
    save = storage.save_file

    def interrupted(*values: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            assert here() != []
            raise KeyboardInterrupt
        save(*values, **named)

    monkeypatch.setattr(storage, "save_file", interrupted)
    outcome = wise(*line.format_map(Places(ready)).split())
    assert outcome.code == 130
    assert calls == call
    assert "Traceback" not in outcome.err
    assert here() == []


def test_an_interruption_while_measuring_says_so_and_exits_with_130(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.generation.GenerationMixin.generate", interrupted)
    outcome = wise("eval", "--memory", ready.memory)
    assert (outcome.code, outcome.out) == (130, "")
    assert here() == []
    require_refusal(outcome, "interrupted", code=130)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("export --memory {memory} --format zip", "--format"),
        ("edit {model} {edits} --passes many", "--passes"),
        ("edit {model} {edits} --pases 3", "--pases"),
        ("edit {model}", "give a MODEL and a file of EDITS"),
        ("edit", "give a MODEL and a file of EDITS"),
        ("edit {model} {edits} --only 0/3", "--only must look like 3/8"),
        ("edit {model} {edits} --only 4/3", "--only must look like 3/8"),
        ("edit {model} {edits} --only half", "--only must look like 3/8"),
        ("edit {model} {edits} --executor slurm", "--executor must be local, ray or"),
        ("improve {model}", "improve"),
    ],
)
def test_a_line_that_cannot_be_parsed_exits_with_2(wise: Wise, ready: Ready, line: str, says: str) -> None:
    outcome = wise(*line.format_map(Places(ready)).split())
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err
    assert "Traceback" not in outcome.err
    assert here() == []


def test_a_gate_that_fails_exits_with_1_and_one_that_holds_with_0(wise: Wise, ready: Ready) -> None:
    common = ("eval", "--memory", ready.memory, "--no-generate", "--fail-under")
    failed = wise(*common, "reliability=1.01")
    require_refusal(failed, "gate failed", "reliability is", code=1)
    assert "reliability" in failed.out
    assert wise(*common, "reliability=0,locality=0").code == 0


def test_strict_exits_with_1_and_writes_nothing_if_an_edit_did_not_take(wise: Wise, ready: Ready) -> None:
    line = f"edit {ready.model} {ready.edits} --strict --writer gradient --passes 1"
    require_refusal(wise(*line.split()), "did not take", code=1)
    assert here() == []


def test_the_four_commands_run_in_one_directory_without_further_arguments(wise: Wise) -> None:
    save_tiny(Path("model"))
    write_edits(Path("edits.jsonl"), EDITS)
    for line, written in (
        ("edit model/ edits.jsonl", "shards"),
        ("merge shards/", "memory"),
        ("eval", None),
        ("export", "edited"),
    ):
        outcome = wise(*line.split())
        assert outcome.code == 0, outcome.err
        assert written is None or written in outcome.out
        if line == "eval":
            assert "reliability" in outcome.out
            assert "generated_exact" in outcome.out
    assert here() == ["edited", "edits.jsonl", "memory", "model", "shards"]
    assert sorted(path.name for path in Path("memory").iterdir()) == ["memory.safetensors", "router.json"]
    assert [edit["id"] for edit in manifest(Path("edited"))["edits"]] == ["one", "two", "three", "four"]
    answer = wise("generate", "edited", "ba be bi", "--max-new-tokens", "3")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        (
            "edit {model} {edits}",
            {"edits", "shards", "seconds", "seconds_per_edit", "peak_rss_bytes", "output", "layer", "untaken"},
        ),
        ("merge {shards}", {"mode", "method", "shards", "edits", "router", "routing", "thresholds", "output"}),
        ("export --memory {memory}", {"format", "edits", "bytes", "seconds", "output"}),
        ("export --memory {merge} --format merged", {"format", "locality", "tokens", "output"}),
        ("edit {model} {edits} --dry-run", {"edits", "shards", "peak_rss_bytes", "planned"}),
        ("merge {shards} --dry-run", {"shards", "peak_rss_bytes", "planned"}),
        ("export --memory {memory} --dry-run", {"bytes", "planned"}),
        ("eval --memory {memory}", {"edits"}),
        ("inspect {shards}", {"kind", "base", "site", "edits", "shards", "files"}),
        ("inspect {memory}", {"kind", "base", "site", "edits", "memories", "files"}),
        ("verify {memory}", {"kind", "checks", "differences", "list"}),
        ("generate {model} ba ka --memory {memory} --max-new-tokens 2 --explain", set()),
    ],
)
def test_json_is_one_object_on_stdout(wise: Wise, ready: Ready, line: str, keys: set[str]) -> None:
    outcome = wise(*line.format_map(Places(ready)).split(), "--json")
    assert outcome.code == 0, outcome.err
    content = json.loads(outcome.out)
    assert isinstance(content, dict)
    results = content["results"]
    assert keys <= (results.keys() if isinstance(results, dict) else set())
    if line.startswith("eval"):
        figures = {"reliability", "generalization", "locality", "portability", "generated_exact", "generated_contains"}
        assert figures <= results["edits"].keys()
        assert figures <= results["edits"]["before"].keys()
        assert {"config", "versions", "n-samples", "higher_is_better", "date"} <= content.keys()
    if line.startswith("generate"):
        assert [answer["prompt"] for answer in results] == ["ba", "ka"]
        steps = [step for answer in results for step in answer["steps"]]
        assert steps
        assert all({"token", "memory", "score", "threshold", "edit"} == step.keys() for step in steps)


@pytest.mark.parametrize("line", ["edit {model} {edits}", "merge {shards}", "export --memory {memory}"])
def test_a_dry_run_writes_nothing_and_loads_no_model(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    before = listing(ready.root)
    outcome = wise(*line.format_map(Places(ready)).split(), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "nothing was written" in outcome.out
    assert here() == []
    assert listing(ready.root) == before


def test_a_dry_run_says_what_a_run_will_hold_and_read(wise: Wise, ready: Ready) -> None:
    whole = json.loads(wise("edit", ready.model, ready.edits, "--dry-run", "--json").out)["results"]["plan"]
    small = ("edit", ready.model, ready.edits, "--dry-run", "--memory-budget", "100KB")
    plan = json.loads(wise(*small, "--json").out)["results"]["plan"]
    assert (whole["streamed"], plan["streamed"]) == (False, True)
    assert whole["weights"] == plan["weights"] > plan["resident"] + plan["layer"]
    assert plan["read"] > plan["sweep"] > 0 == whole["read"]
    text = wise(*small).out
    assert all(word in text for word in ("stay in memory", "pass through", "TFLOP", "nothing was written"))


def test_within_a_small_budget_the_chain_writes_and_measures_the_same(wise: Wise, ready: Ready) -> None:
    small = ("--memory-budget", "100KB")
    assert wise("edit", ready.model, ready.edits, "--shards", "2", *small).code == 0
    assert wise("edit", ready.model, ready.edits, "--shards", "2", "-o", "whole").code == 0
    assert contents("shards") == contents("whole")
    assert wise("merge", "shards").code == 0
    streamed, held = (json.loads(wise("eval", "--json", *flags).out)["results"] for flags in (small, ()))
    assert streamed == held
    prompt = EDITS[0]["prompt"]
    answers = [wise("generate", ready.model, prompt, "--memory", "memory", *flags).out for flags in (small, ())]
    assert answers[0] == answers[1]


def test_force_replaces_the_whole_output(wise: Wise, ready: Ready) -> None:
    shutil.copytree(ready.retrieve, "memory")
    (Path("memory") / "left-over.txt").write_text("old")
    assert wise("merge", ready.shards, "--force").code == 0
    assert here() == ["memory"]
    assert sorted(path.name for path in Path("memory").iterdir()) == ["memory.safetensors", "router.json"]
    assert len(manifest(Path("memory"))["memories"]) == 1


@pytest.mark.parametrize("writer", ["solve", "gradient"])
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


def contents(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).glob("*.safetensors")}


def test_the_manifest_of_shards_keeps_the_penalty_of_the_closed_form(ready: Ready) -> None:
    known = {(penalty.ridge, penalty.unrelated) for penalty in PENALTIES}
    for name, expected in (("shards", True), ("gradient-shards", False)):
        listed = [shard["penalty"] for shard in manifest(ready.root / name)["shards"]]
        read = [entry.penalty for entry in read_shard_directory(ready.root / name).shards]
        assert [None if penalty is None else tuple(penalty) for penalty in listed] == read
        assert [penalty in known for penalty in read] == [expected] * 2
        assert expected or read == [None, None]


# Flags of `wise merge`, and the mode that shards of the closed form and of the paper's writer then get.
MERGES: dict[str, tuple[str, str]] = {
    "": ("lookup", "merge"),
    "--mode lookup": ("lookup", "lookup"),
    "--no-refit": ("merge", "merge"),
    "--refit": ("merge", "merge"),
    "--method exact": ("merge", "merge"),
    "--method slerp": ("merge", "merge"),
    "--router norm": ("merge", "merge"),
    "--mode merge": ("merge", "merge"),
    "--mode merge --method ties --no-refit": ("merge", "merge"),
    "--mode retrieve": ("retrieve", "retrieve"),
    "--mode retrieve --router norm": ("retrieve", "retrieve"),
    "--mode lookup --sharpness 20 --routing sequence": ("lookup", "lookup"),
}


@pytest.mark.parametrize("shards", ["shards", "gradient-shards"])
@pytest.mark.parametrize("flags", MERGES)
def test_shards_of_either_writer_merge_in_every_mode_and_the_memory_works(
    wise: Wise, ready: Ready, flags: str, shards: str
) -> None:
    mode = MERGES[flags][0 if shards == "shards" else 1]
    merged = wise("merge", str(ready.root / shards), *flags.split(), "--json")
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["results"]["mode"] == mode
    tensors = load_file(Path("memory") / "memory.safetensors")
    if mode == "lookup":
        # The closed form has one residual for each token of a target and the end of text, whatever the contexts.
        places = sum(len(edit["target"].split()) + 1 for edit in EDITS)
        assert len(tensors["values"]) == (places if shards == "shards" else len(tensors["probes"]))
        assert len(tensors["value"]) == len(tensors["probes"]) > places
        assert set(tensors["owner"].tolist()) == {0, 1, 2, 3}
    else:
        assert len(tensors["delta"]) == (2 if mode == "retrieve" else 1)
    measured = wise("eval", "--json", "--no-generate")
    assert measured.code == 0, measured.err
    assert 0 <= json.loads(measured.out)["results"]["edits"]["reliability"] <= 1
    if flags in ("", "--refit", "--mode retrieve"):
        assert wise("export").code == 0
        assert load_file(Path("edited") / "model-side-memory.safetensors").keys() >= {
            f"model.layers.3.mlp.down_proj.{name}" for name in tensors
        }


def test_a_lookup_gives_every_edit_its_answer_where_it_opens(wise: Wise, ready: Ready) -> None:
    assert wise("merge", ready.shards, "--false-alarm", "0.5").code == 0
    answers = json.loads(wise("generate", "memory", *prompts(), "--explain", "--json").out)["results"]
    for number, (answer, edit) in enumerate(zip(answers, EDITS, strict=True)):
        assert {step["memory"] for step in answer["steps"]} == {number}
        assert {step["edit"] for step in answer["steps"]} == {edit["prompt"]}
        assert answer["answer"] == edit["target"]


def prompts() -> list[str]:
    return [edit["prompt"] for edit in EDITS]


def test_a_refit_gives_keys_back_what_merging_takes_from_them(wise: Wise, ready: Ready) -> None:
    shards = [load_file(path) for path in sorted(Path(ready.shards).glob("shard-*.safetensors"))]
    trained = [~shard["evidence.held_out"] for shard in shards]
    keys, wanted = (
        torch.cat([shard[f"evidence.{name}"][own] for shard, own in zip(shards, trained, strict=True)]).float()
        for name in ("keys", "residuals")
    )
    errors = {}
    for flags in ("--mode merge --no-refit", "--mode merge --refit", "--method exact"):
        assert wise("merge", ready.shards, *flags.split(), "--force").code == 0
        memory = load_file(Path("memory") / "memory.safetensors")
        given = keys[:, memory["columns"][0]] @ memory["delta"][0].T
        errors[flags] = float((given - wanted).square().sum() / wanted.square().sum())
    merged, refitted, exact = errors.values()
    assert refitted < 0.5 * merged
    assert exact < 0.5 * merged


def test_retrieve_keeps_a_memory_for_each_shard(wise: Wise, ready: Ready) -> None:
    assert wise("merge", ready.shards, "--mode", "retrieve").code == 0
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
    assert len(written["contexts"]) == 4  # the bare prompt, two to train with, one held back
    assert {shard["mask_kind"] for shard in written["shards"]} == {"elements"}
    assert wise("merge", "shards").code == 0
    memory = manifest(Path("memory"))
    assert (memory["routing"], memory["memories"][0]["router"]) == ("sequence", "norm")
    assert memory["memories"][0]["rule"] == "minimum"
    assert wise("eval").code == 0


def test_flags_win_over_the_environment_and_that_over_the_file(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISE_CONTEXTS", "1")
    Path("wise.toml").write_text("[edit]\ncontexts = 0\nlayer = '1'\nseed = 5\n")
    assert wise("edit", ready.model, ready.edits, "--config", "wise.toml", "--seed", "3").code == 0
    settings = manifest(Path("shards"))["settings"]
    assert (settings["contexts"], settings["layer"], settings["seed"]) == (1, "1", 3)


@pytest.mark.parametrize("writer", ["solve", "gradient"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_half_precision_are_edited(wise: Wise, ready: Ready, tmp_path: Path, writer: str, dtype: str) -> None:
    shards, memory = tmp_path / "shards", tmp_path / "memory"
    for line in (
        f"edit {ready.model} {ready.edits} -o {shards} --writer {writer} --dtype {dtype} --layer 2",
        f"merge {shards} -o {memory}",
        f"eval --memory {memory} --dataset {ready.edits} --dtype {dtype} --no-generate",
    ):
        assert wise(*line.split()).code == 0


def test_explained_answers_of_the_chain_name_who_answered(wise: Wise, chain: Chain) -> None:
    edit, base = chain.edits[0], ("How many days are there in a leap year", "--max-new-tokens", "4")
    told = wise("generate", str(chain.exported), edit["prompt"], "--json", "--explain")
    (answer,) = json.loads(told.out)["results"]
    assert answer["answer"] == edit["target"]
    assert answer["steps"]
    assert {step["memory"] for step in answer["steps"]} == {0}
    assert {step["edit"] for step in answer["steps"]} == {edit["prompt"]}
    assert all(step["score"] > step["threshold"] for step in answer["steps"])
    assert "".join(step["token"] for step in answer["steps"]).strip() == edit["target"]
    other = wise("generate", str(chain.model), *base, "--memory", str(chain.memory), "--explain")
    assert "main memory" in other.out
    assert "side memory" not in other.out


def test_plain_answers_of_the_chain_are_the_answers_alone(wise: Wise, chain: Chain) -> None:
    one, two = chain.edits[:2]
    assert wise("generate", str(chain.exported), one["prompt"]).out == f"{one['target']}\n"
    expected = "".join(f"{edit['prompt']} → {edit['target']}\n" for edit in (one, two))
    assert wise("generate", str(chain.exported), one["prompt"], two["prompt"]).out == expected


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nfrom wisecli.cli import main\n"
        "for arguments in (['--help'], ['edit', '--help'], ['--version']):\n"
        "    sys.argv = ['wise', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as stopped:\n        assert not stopped.code, stopped.code\n"
        "sys.exit(3 if {'torch', 'transformers'} & sys.modules.keys() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--mask-ratio" in done.stdout
    assert "wise 0." in done.stdout


def test_a_process_of_its_own_says_its_result_and_nothing_else(ready: Ready, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wisecli.cli", "eval", "--memory", ready.memory, "--json", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "edits" in json.loads(done.stdout)["results"]
    assert list(tmp_path.iterdir()) == []
