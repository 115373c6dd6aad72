from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.tiny_models import Wise

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "refusals.py"
# Torch and transformers take seconds to import, and pydantic and Rich longer than all else that a refusal needs.
SLOW = ("torch", "transformers", "numpy", "safetensors", "pydantic", "rich", "jinja2")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refusals", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    script().make_places(root)
    return root


def imported(places: Path, *arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, what was said, and the slow modules that a run has imported."""
    code = (
        "import sys\nfrom wisecli.cli import main\n"
        f"sys.argv = {['wise', *arguments]!r}\n"
        "try:\n    main()\n"
        f"finally:\n    print(*sorted(set(sys.modules) & {set(SLOW)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=places, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, set(done.stdout.split())


@pytest.mark.parametrize("name", script().REFUSALS)
def test_what_is_refused_at_the_door_is_refused_before_anything_slow_is_imported(places: Path, name: str) -> None:
    code, said, slow = imported(places, *script().REFUSALS[name])
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert slow == set()
    assert (places / "foreign" / "letter.txt").read_text() == "keep me"


@pytest.mark.thorough
def test_a_sound_edit_does_import_them(places: Path) -> None:
    code, said, slow = imported(places, "edit", "./no-model", "edits.jsonl")
    assert (code, "torch" in slow) == (2, True), said


@pytest.mark.thorough
def test_a_refusal_takes_at_most_ten_times_a_python_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # an installed program is compiled
    nothing, refusals = script().measure(9)
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
