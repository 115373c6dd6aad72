"""What a command writes depends on what it is given, and on nothing that happens to be so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.benching import make_quick
from support.clock import set_clock, with_clock
from support.forking import Forked
from support.helpers import save_tiny
from support.ready import EDITS, Ready, write_edits
from support.tiny_models import Wise

FIRST, SECOND = "2026-11-26", "2026-11-27"


def tensors(directory: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(directory).rglob("*.safetensors"))}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    set_clock(monkeypatch, FIRST)
    return with_clock(save_tiny(tmp_path / "model"))


def test_shards_are_reproduced_on_another_day(
    wise: Wise, ready: Ready, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug reports on chat templates: `strftime_now` puts today's date into every prompt, and no run comes out again."""
    line = ("edit", str(model), ready.edits)
    assert wise(*line).code == 0
    assert json.loads(Path("shards/shards.json").read_text())["made"]["date"] == FIRST
    assert wise("merge", "shards").code == 0
    set_clock(monkeypatch, SECOND)
    assert wise(*line, "-o", "tomorrow").code == 0
    assert tensors("tomorrow") != tensors("shards")  # or this would prove nothing
    assert "up to date" in wise(*line).out
    for manifest in ("shards/shards.json", "memory/router.json"):
        outcome = wise("edit", "--reproduce", manifest, "-o", "again", "--force")
        assert (outcome.code, "byte for byte" in outcome.out) == (0, True), outcome.err
        assert tensors("again") == tensors("shards")


def test_a_run_that_goes_on_after_midnight_stays_on_its_day(
    wise: Wise, ready: Ready, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Array jobs: the parts of one output start on two days, and one that was broken off goes on the next morning."""
    line = ("edit", str(model), ready.edits, "--shards", "2")
    assert wise(*line, "-o", "whole").code == 0
    assert wise(*line, "--only", "1/2").code == 0
    set_clock(monkeypatch, SECOND)
    assert wise(*line, "--only", "2/2").code == 0
    assert tensors("shards") == tensors("whole")
    assert json.loads(Path("shards/shards.json").read_text())["made"]["date"] == FIRST


def test_the_day_is_recorded_with_figures(
    wise: Wise, ready: Ready, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug reports on evaluations: figures of a chat model moved from day to day, and nothing said why."""
    make_quick(monkeypatch)
    assert wise("edit", str(model), ready.edits).code == 0
    assert wise("merge", "shards").code == 0
    told = json.loads(wise("eval", "--memory", "memory", "--chat", "--json").out)
    assert told["config"]["chat_date"] == FIRST
    line = ("bench", str(model), "--dataset", "here", "--data", ready.edits, "--edits", "2", "--methods", "icl")
    line += ("--no-generate",)
    assert wise(*line).code == 0
    set_clock(monkeypatch, SECOND)
    assert wise(*line).code == 0
    assert json.loads(Path("bench/about.json").read_text())["chat_date"] == FIRST


# Manifests hold seconds, and digests of what does; the log holds times.
_OF_TIMES = ("shards.json", "router.json", "wise.json", "log.jsonl", "SHA256SUMS")
_LINES = (
    "edit ../model edits -q",
    "merge shards -q",
    "export ../model -q",
    "export --format stock --no-verify -o stock -q",
)
_CHAIN = """
import sys
from wisecli import cli
for line in sys.argv[1:]:
    sys.argv = ["wise", *line.split()]
    try:
        cli.main()
    except SystemExit as stopped:
        assert not stopped.code, line
"""


def begun(root: Path) -> dict[str, str]:
    """The environment of commands that find the edits in a directory, and nothing in the cache."""
    root.mkdir()
    write_edits(root / "edits", EDITS)
    given = {"XDG_CACHE_HOME": str(root / "cache"), "OMP_NUM_THREADS": "1", "WISE_UNRELATED_TEXTS": "16"}
    return {**given, "WISE_RESIDUAL_STOP": "0.2", "SOURCE_DATE_EPOCH": "1700000000"}


def written(root: Path) -> dict[str, bytes]:
    """All that commands wrote, but for times."""
    shutil.rmtree(root / "cache")
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in _OF_TIMES)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def as_usual(root: Path, forks: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What the chain of commands writes where the tests run, with a hash seed that was drawn."""
    process = Forked(forks, root.parent / "errors", begun(root))
    with monkeypatch.context() as patch:
        patch.chdir(root)
        for line in _LINES:
            assert process.run(line) == 0, process.errors.read_text()
    return written(root)


def elsewhere(root: Path, **environment: str) -> dict[str, bytes]:
    """What the chain of commands writes in a process with this environment."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **begun(root), **environment}
    subprocess.run([sys.executable, "-c", _CHAIN, *_LINES], cwd=root, env=given, check=True, capture_output=True)
    return written(root)


def test_nothing_depends_on_locale_zone_hash_seed_or_the_order_of_files(
    tmp_path: Path, forks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reproducible builds: what differs between two machines that are given the same input."""
    with_clock(save_tiny(tmp_path / "model"))
    first = as_usual(tmp_path / "one", forks, monkeypatch)
    # The same files, written in another order.
    moved = tmp_path / "other"
    moved.mkdir()
    for path in sorted((tmp_path / "model").iterdir(), reverse=True):
        shutil.copyfile(path, moved / path.name)
    shutil.rmtree(tmp_path / "model")
    moved.rename(tmp_path / "model")
    second = elsewhere(tmp_path / "two", PYTHONHASHSEED="2", TZ="Pacific/Kiritimati", LC_ALL="tr_TR.UTF-8")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
