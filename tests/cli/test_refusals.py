import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.light import Run, light_runs
from support.tiny_models import Wise

# Torch and transformers take seconds to import, and pydantic and Rich longer than all else that a refusal needs.
SLOW = ("torch", "transformers", "numpy", "safetensors", "pydantic", "rich", "jinja2")
# What is refused, by the arguments of `wise`.
REFUSALS: dict[str, tuple[str, ...]] = {
    "no such file": ("edit", "model", "nowhere.jsonl"),
    "empty file": ("edit", "model", "empty.jsonl"),
    "malformed line": ("edit", "model", "malformed.jsonl"),
    "malformed, into a memory": ("edit", "model", "malformed.jsonl", "--into", "memory"),
    "unknown flag": ("edit", "model", "edits.jsonl", "--pases", "3"),
    "value of the wrong kind": ("edit", "model", "edits.jsonl", "--set", "passes=many"),
    "value out of bounds": ("edit", "model", "edits.jsonl", "--set", "passes=0"),
    "foreign output": ("edit", "model", "edits.jsonl", "-o", "foreign"),
    "foreign output, forced": ("edit", "model", "edits.jsonl", "-o", "foreign", "--force"),
    "foreign output of a merge": ("merge", "shards", "-o", "foreign"),
    "foreign output of an export": ("export", "model", "-o", "foreign"),
}


def make_places(root: Path) -> None:
    """Files to be refused."""
    (root / "edits.jsonl").write_text('{"prompt": "ba", "target": "do"}\n')
    (root / "malformed.jsonl").write_text('{"prompt": "ba", "target"\n')
    (root / "empty.jsonl").write_text("")
    (root / "foreign").mkdir()
    (root / "foreign" / "letter.txt").write_text("keep me")


def best(command: list[str], root: Path, runs: int, code: int) -> float:
    """Seconds of the fastest of several runs, each of which must end with an exit code."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=root, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
    return min(seconds)


def measure(runs: int) -> tuple[float, dict[str, float]]:
    """Seconds of a Python that does nothing, and of each refusal."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_places(root)
        nothing = best([sys.executable, "-c", "pass"], root, 3 * runs, 0)
        wise = [sys.executable, "-m", "wisecli"]
        return nothing, {name: best([*wise, *line], root, runs, 2) for name, line in REFUSALS.items()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What became of all that is refused."""
    root = tmp_path_factory.mktemp("refusals")
    make_places(root)
    runs = light_runs(list(REFUSALS.values()), root)
    assert (root / "foreign" / "letter.txt").read_text() == "keep me"
    return dict(zip(REFUSALS, runs, strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_at_the_door_is_refused_before_anything_slow_is_imported(
    refused: dict[str, Run], name: str
) -> None:
    run = refused[name]
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert run.modules & set(SLOW) == set()


@pytest.mark.thorough
def test_a_sound_edit_does_import_them(tmp_path: Path) -> None:
    make_places(tmp_path)
    (run,) = light_runs([("edit", "./no-model", "edits.jsonl")], tmp_path)
    assert (run.code, "torch" in run.modules) == (2, True), run.err


@pytest.mark.thorough
def test_a_refusal_takes_at_most_ten_times_a_python_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # an installed program is compiled
    nothing, refusals = measure(9)
    assert {name: seconds / nothing for name, seconds in refusals.items() if seconds > 10 * nothing} == {}
    assert max(refusals.values()) < 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("edit m e --pases 3", "No such option: --pases"),
        ("edit m e --set passes=many", "passes must be a whole number, not 'many'"),
        ("edit m e --set mask_ratio=half", "mask_ratio must be a number, not 'half'"),
        ("edit m e --set interval=0", "interval must lie"),
        ("edit m e --on-conflict never", "never"),
        ("edit m e -o ''", "--output is empty"),
        ("eddit m e", "No such command 'eddit'"),
        ("edit m e f g", "unexpected extra argument"),
        ("generate", "Missing argument"),
        ("inspect x --limit -1", "--limit"),
    ],
)
def test_a_line_that_is_written_wrongly_is_refused_in_one_sentence(wise: Wise, line: str, says: str) -> None:
    outcome = wise(*shlex.split(line))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("error: ")
    assert says in outcome.err


def test_without_a_command_the_help_is_shown(wise: Wise) -> None:
    outcome = wise()
    assert "Usage: wise" in outcome.out + outcome.err
    assert wise("--help").code == wise("edit", "-h").code == wise("--version").code == 0
