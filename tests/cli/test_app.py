import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
from support.helpers import contents, save_tiny
from support.light import light_runs
from support.ready import EDITS, Places, Ready, here, listing, manifest, require_refusal, write_edits
from support.tiny_models import Wise

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
    "unknown architecture": ("edit {foreign_model} {edits}", ("'unheard_of'", "a newer transformers")),
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
    "unknown writer": ("edit {model} {edits} --writer pen", ("writer must be", "'pen'", "solve", "gradient")),
    "edits in a chat without a template": ("edit {model} {edits} --chat", ("chat template", "--chat")),
    "unknown schedule": ("edit {model} {edits} --schedule never", ("schedule must be", "'never'")),
    "more shards than edits": ("edit {model} {edits} --shards 9", ("shards=9", "4 edits")),
    "no passes": ("edit {model} {edits} --passes 0", ("passes must",)),
    "mask beyond the matrix": ("edit {model} {edits} --mask-ratio 1.5", ("mask_ratio must",)),
    "settings file missing": ("edit {model} {edits} --config {nowhere}", ("nowhere",)),
    "edit over an output": ("edit {model} {edits} -o {memory}", ("already exists", "--force")),
    "unknown method": ("merge {shards} --method soup", ("--method 'soup'", "ties")),
    "unknown mode": ("merge {shards} --mode blend", ("mode must be", "'blend'", "lookup")),
    "a lookup of what gradients wrote": ("merge {gradient_shards} --mode lookup", ("what prompts mean", "wise edit")),
    "a mean of what was written for prompts' ends": ("merge {gradient_shards} --pooling mean", ("--preset paper",)),
    "too few weights": ("merge {shards_at_matrix} --mode merge --weights 1", ("--weights has 1", "2 shards")),
    "too many weights": ("merge {shards_at_matrix} --mode merge --weights 1,2,3", ("--weights has 3", "2 shards")),
    "weights that are no numbers": ("merge {shards} --weights 1,much", ("--weights", "1,much")),
    "truncated shard": ("merge {cut_shards}", ("shard-00001.safetensors", "not a whole safetensors file")),
    "altered shard": ("merge {tampered_shards}", ("shard-00001.safetensors", "sha256")),
    "unreadable shards.json": ("merge {scribbled_shards}", ("shards.json", "JSON")),
    "no directory of shards": ("merge {model}", ("shards.json",)),
    "shards of two layers": ("merge {shards} {shards_elsewhere}", ("layer",)),
    "shards of two models": ("merge {shards} {shards_of_other_model}", ("models",)),
    "shards twice": ("merge {shards} {shards}", ("'one'", "more than one")),
    "shards of another base": ("merge {shards} --model {other_model}", ("other-model", "not the base model")),
    "merge over another memory": ("merge {shards} -o {merge}", ("already exists", "mode was merge, now", "--force")),
    "merge over a damaged memory": (
        "merge {shards} -o {tampered_memory}",
        ("already exists", "memory.safetensors is not as it was written", "--force"),
    ),
    "edit over other shards": (
        "edit {model} {other_edits} -o {shards}",
        ("already exists", "4 are gone, the first of them 'one'", "--force"),
    ),
    "edit over shards by other settings": ("edit {model} {edits} -o {shards}", ("shards was 2, now None", "--force")),
    "edit over damaged shards": (
        "edit {model} {edits} -o {tampered_shards} --shards 2 --passes 2",
        ("already exists", "shard-00001.safetensors is not as it was written", "--force"),
    ),
    "merge over the current directory": ("merge {shards} -o . --force", ("current directory",)),
    "merge over what holds it": ("merge {shards} -o .. --force", ("current directory",)),
    "merge over its shards": ("merge {shards} -o {shards} --force", ("is an input", "-o")),
    "merge over a model": ("merge {shards} -o {other_model} --force", ("other-model", "config.json")),
    "merge over edits": ("merge {shards} -o {edits} --force", ("edits", "is no directory")),
    "edit over the base model": ("edit {model} {edits} -o {model} --force", ("is an input",)),
    "edit over what holds the base model": ("edit {model} {edits} -o {root} --force", ("input of the command",)),
    "edit over a memory": ("edit {model} {edits} -o {memory} --force", ("memory", "holds no shards.json")),
    "export over the base model": ("export --memory {memory} -o {model} --force", ("model", "holds no router.json")),
    "export over another memory": (
        "export --memory {memory} -o {bare_memory} --force",
        ("is a memory, and no export",),
    ),
    "export over a history": ("export --memory {memory} -o {merge} --force", ("holds history",)),
    "export over its memory": ("export --memory {memory} -o {memory} --force", ("is an input",)),
    "export over shards": ("export --memory {memory} -o {shards} --force", ("shards", "holds no router.json")),
    "no memory to measure": ("eval", ("memory", "wise merge")),
    "no memory in a directory": ("eval --memory {empty}", ("holds nothing that `wise` wrote", "wise merge")),
    "no memory at a path": ("log nowhere", ("nowhere does not exist", "wise merge")),
    "history of shards": ("log {shards}", ("holds shards", "wise merge")),
    "history of a model": ("rollback {model} --to 1", ("is a model", "wise merge")),
    "model for shards": ("merge {model}", ("is a model", "shards.json", "wise edit")),
    "nothing to compare": ("diff {memory} nowhere", ("nowhere does not exist", "a memory, shards")),
    "life of an unknown edit": ("log {memory} --edit none", ("touched an edit 'none'", "wise log")),
    "memory of another base": ("eval {other_model} --memory {memory}", ("other-model", "not the base model")),
    "memory whose base is gone": ("eval --memory {homeless_memory}", ("/nowhere",)),
    "truncated memory": ("eval --memory {cut_memory}", ("memory.safetensors", "not a whole safetensors file")),
    "altered memory": ("eval --memory {tampered_memory}", ("memory.safetensors", "sha256")),
    "gate without a number": ("eval --memory {memory} --fail-under reliability", ("--fail-under", "reliability=.9")),
    "gate that is no number": ("eval --memory {memory} --fail-under locality=high", ("--fail-under",)),
    "gate of no figure": ("eval --memory {memory} --fail-under charm=.9", ("no such figure", "charm", "reliability")),
    "gate of what is not measured": (
        "eval --memory {memory} --no-generate --fail-under asked=.9",
        ("asked", "not measured here"),
    ),
    "unknown dataset": ("eval --memory {memory} --dataset trivia", ("trivia", "zsre")),
    "benchmark without network": ("eval --memory {memory} --dataset zsre", ("--data",)),
    "benchmark on no hub": ("eval --memory {memory} --dataset temporal", ("temporal", "--data")),
    "several memories merged": ("export --memory {retrieve} --format merged", ("several", "--format routed")),
    "lookup merged": ("export --memory {memory} --format merged", ("lookup", "--mode merge")),
    "export over an output": ("export --memory {memory} -o {model}", ("already exists", "--force")),
    "export of an altered memory": ("export --memory {tampered_memory}", ("memory.safetensors", "sha256")),
    "export onto another base": ("export --memory {memory} --model {other_model}", ("not the base model",)),
    "no prompt to answer": ("generate {model}", ("Missing argument 'prompts'",)),
    "no memory to answer from": ("generate {model} ba", ("memory",)),
    "nowhere to inspect": ("inspect nowhere", ("nowhere does not exist", "wise merge")),
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


@pytest.mark.parametrize("line", ["edit {model} {edits}", "merge {shards}", "export --memory {memory}"])
def test_a_full_disk_is_noticed_before_the_work(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 100, 100))
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: pytest.fail("something was written"))
    require_refusal(wise(*line.format_map(Places(ready)).split()), "no space left")
    assert here() == []


@pytest.mark.parametrize("line", ["edit {model} {edits}", "merge {shards}", "export --memory {memory}"])
def test_a_disk_that_fills_up_leaves_nothing(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
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
    save = safetensors.torch.save_file

    def interrupted(*values: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            assert here() != []
            raise KeyboardInterrupt
        save(*values, **named)

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    outcome = wise(*line.format_map(Places(ready)).split())
    assert outcome.code == 130
    assert calls == call
    assert "Traceback" not in outcome.err
    assert here() == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("export --memory {memory} --format zip", "--format"),
        ("edit {model} {edits} --passes many", "passes must be"),
        ("edit {model} {edits} --pases 3", "--pases"),
        ("edit {model}", "give a MODEL and a file of EDITS"),
        ("edit", "give a MODEL and a file of EDITS"),
        ("edit {model} {edits} --only 0/3", "only must look like 3/8"),
        ("edit {model} {edits} --only 4/3", "only must look like 3/8"),
        ("edit {model} {edits} --only half", "only must look like 3/8"),
        ("edit {model} {edits} --executor slurm", "executor must be local, ray or"),
        ("improve {model}", "improve"),
    ],
)
def test_a_line_that_cannot_be_parsed_exits_with_2(wise: Wise, ready: Ready, line: str, says: str) -> None:
    outcome = wise(*line.format_map(Places(ready)).split())
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err
    assert "Traceback" not in outcome.err
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
    held = {path.name for path in Path("memory").iterdir()}
    assert held == {"SHA256SUMS", "history", "memory.safetensors", "router.json"}
    assert [edit["id"] for edit in manifest(Path("edited"))["edits"]] == ["one", "two", "three", "four"]
    answer = wise("generate", "edited", "ba be bi", "--max-new-tokens", "3")
    assert answer.code == 0, answer.err
    # The next day goes on with the same memory.
    write_edits(Path("more.jsonl"), [{"id": "five", "prompt": "na ne", "target": "ni"}, {**EDITS[0], "target": "mu"}])
    outcome = wise(*["edit", "model", "more.jsonl", "--into", "memory"])
    assert "release 2 of memory/: 1 edit in, 1 modified, 5 held" in outcome.out
    assert "modified: one" in outcome.out.splitlines()
    assert "superseded" not in outcome.out
    assert "5 edits held; the log is whole" in wise("log", "memory").out


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        (
            "edit {model} {edits}",
            {"edits", "shards", "seconds", "seconds_per_edit", "peak_rss_bytes", "output", "layer", "untaken"},
        ),
        ("merge {shards}", {"mode", "method", "shards", "edits", "thresholds", "output"}),
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


def test_a_dry_run_of_an_edit_does_without_torch(wise: Wise, ready: Ready) -> None:
    line = ("edit", ready.model, ready.edits, "--dry-run", "--json")
    (run,) = light_runs([line])
    assert (run.code, "torch" in run.modules) == (0, False)
    assert json.loads(run.out)["results"]["plan"] == json.loads(wise(*line).out)["results"]["plan"]


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


def test_help_imports_no_torch() -> None:
    asked = ("edit --help", "inspect --help", "verify --help", "--help", "--version")
    runs = dict(zip(asked, light_runs([line.split() for line in asked]), strict=True))
    for run in runs.values():
        assert run.code == 0, run.err
        assert not {"torch", "transformers", "matplotlib"} & run.modules
    assert "--set" in runs["edit --help"].out
    assert "--json" in runs["inspect --help"].out
    assert "--json" in runs["verify --help"].out
    assert "wise 0." in runs["--version"].out


def test_a_process_of_its_own_says_its_result_and_nothing_else(ready: Ready, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wisecli", "eval", "--memory", ready.memory, "--json", "-q", "--ask", "1"]
    environment = {**os.environ, "WISE_FORMS": "bare,polite", "WISE_KINDS": "capitals,translate"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "edits" in json.loads(done.stdout)["results"]
    assert list(tmp_path.iterdir()) == []
