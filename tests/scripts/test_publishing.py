import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.helpers import save_tiny
from support.history import fact, write

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "ci.md"


def workflow() -> dict[str, Any]:
    text = DOCUMENT.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    read: dict[str, Any] = yaml.safe_load(text)
    return read


@pytest.fixture
def path(forks: Path) -> str:
    """Where `wise` is found."""
    return f"{forks}:{os.environ['PATH']}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with facts, as the workflow finds it."""
    save_tiny(tmp_path / "model")
    (tmp_path / "facts").mkdir()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    write(tmp_path / "facts" / "edits.jsonl", [fact(0), fact(1)])
    return tmp_path


def steps(checkout: Path, path: str, **given: str) -> int:
    """Run what the documented workflow runs, but for the installation; the first exit code that is not zero."""
    flags = {
        "MODEL": "model",
        "FLAGS": "--layer 2",
        "WISE_UNRELATED_TEXTS": "16",
        "WISE_RESIDUAL_STOP": "0.2",
        "WISE_FORMS": "bare,polite",
        "WISE_KINDS": "capitals,translate",
        "PATH": path,
        "REASON": "a test",
        **given,
    }
    for step in workflow()["jobs"]["edit"]["steps"]:
        if "run" not in step or step["run"].startswith("pip install"):
            continue
        environment = {**os.environ, **step.get("env", {}), **flags}
        done = subprocess.run(["bash", "-c", step["run"]], cwd=checkout, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


def test_the_workflow_publishes_only_what_passes_the_gate(checkout: Path, path: str) -> None:
    assert steps(checkout, path, GATE="reliability=1.1") == 1
    assert not (checkout / "edited").exists()
    assert not (checkout / "memory").exists()
    assert steps(checkout, path, GATE="reliability=.5") == 0
    assert (checkout / "edited" / "model.safetensors.index.json").is_file()
    assert "reliability" in (checkout / "edited" / "README.md").read_text()
    assert edits(checkout / "edited") == ["e0", "e1"]
    memory, published = ((checkout / name).read_bytes() for name in ("memory/memory.safetensors", "edited/router.json"))
    write(checkout / "facts" / "edits.jsonl", [fact(2), fact(1, target=3, name="new")])
    assert steps(checkout, path, GATE="reliability=1.1") == 1
    assert (checkout / "memory" / "memory.safetensors").read_bytes() == memory
    assert (checkout / "edited" / "router.json").read_bytes() == published
    log = [json.loads(line) for line in (checkout / "memory" / "history" / "log.jsonl").read_text().splitlines()]
    assert [(one["action"], one["reason"]) for one in log] == [("edit", "a test")]
    # What was refused is there to be published by another gate, or after another edit.
    assert steps(checkout, path, GATE="reliability=.5") == 0
    assert edits(checkout / "edited") == ["e0", "e2", "new"]
    log = [json.loads(line) for line in (checkout / "memory" / "history" / "log.jsonl").read_text().splitlines()]
    assert log[1]["superseded"] == {"e1": "new"}
    assert [one.name for one in checkout.iterdir() if one.name.startswith(".")] == []


def state(*directories: Path) -> dict[str, tuple[int, int]]:
    files = (path for directory in directories for path in (directory, *directory.rglob("*")))
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.thorough
def test_the_same_edits_again_change_nothing(checkout: Path, path: str) -> None:
    # These records have neither rephrases nor locality prompts, so that only reliability is gated.
    gate = "reliability=.5,generalization=.99,locality=.99"
    assert steps(checkout, path, GATE=gate) == 0
    before = state(checkout / "memory", checkout / "edited")
    assert steps(checkout, path, GATE=gate) == 0
    assert state(checkout / "memory", checkout / "edited") == before
    # What a killed run left is taken away, and a memory that it had put aside comes back.
    (checkout / ".memory.candidate").mkdir()
    (checkout / "memory").rename(checkout / ".memory.before")
    assert steps(checkout, path, GATE=gate) == 0
    assert state(checkout / "memory", checkout / "edited") == before
    assert [one.name for one in checkout.iterdir() if one.name.startswith(".")] == []


def test_a_checkpoint_that_somebody_changed_is_not_replaced(checkout: Path, path: str) -> None:
    assert steps(checkout, path, GATE="reliability=.5") == 0
    card = checkout / "edited" / "README.md"
    card.write_text(card.read_text() + "Written by hand.")
    write(checkout / "facts" / "edits.jsonl", [fact(2)])
    before = state(checkout / "memory", checkout / "edited")
    assert steps(checkout, path, GATE="reliability=.5") == 2
    assert state(checkout / "memory", checkout / "edited") == before
    for name in ("notes", "facts"):
        (checkout / "notes").mkdir(exist_ok=True)
        (checkout / "notes" / "mine.txt").write_text("mine")
        command = ["bash", "scripts/publish-edits", "model", "facts/edits.jsonl", name]
        done = subprocess.run(command, cwd=checkout, env={**os.environ, "PATH": path}, check=False)
        assert done.returncode == 2
    assert state(checkout / "memory", checkout / "edited") == before


def edits(directory: Path) -> list[str]:
    return [edit["id"] for edit in json.loads((directory / "router.json").read_text())["edits"]]


def test_input_that_cannot_be_used_ends_in_2(checkout: Path, path: str) -> None:
    (checkout / "facts" / "edits.jsonl").write_text('{"prompt": "ba"}\n')
    assert steps(checkout, path) == 2
    assert sorted(path.name for path in checkout.iterdir()) == ["facts", "model", "scripts"]


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run([ROOT / "scripts" / "publish-edits"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "publish-edits MODEL EDITS.jsonl OUTPUT" in done.stderr
