"""Two commands at once on one memory: one waits or is refused, and nothing is lost."""

import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.forking import Forked
from support.helpers import save_tiny
from support.history import FLAGS, batch_from, fact, write
from support.loading import CPU

from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.edit.edit import edit
from wisecli.commands.edit.edit_into import IntoMemory, edit_into
from wisecli.commands.edit.watch import follow
from wisecli.commands.memory.log import log
from wisecli.config import EditSettings
from wisecli.errors import BusyError
from wisecli.memory.history import release_log

# Pairs of commands that start at about the same time take longer than this, in seconds.
LONGEST = 0.6
INTO = "edit {root}/model {root}/%s.jsonl --into memory --device cpu -q --config {root}/wise.toml"


@dataclass(frozen=True)
class Command:
    """A command, what it brings into the memory and takes out, and whether it only reads."""

    line: str
    brings: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    reads: str = ""


COMMANDS = {
    "into two": Command(INTO % "two", brings=frozenset({"e2"})),
    "into three": Command(INTO % "three", brings=frozenset({"e3"})),
    "remove": Command("remove memory e0 -q", takes=frozenset({"e0"})),
    "merge": Command("merge {root}/shards --into memory -q", brings=frozenset({"e4"})),
    "export": Command("export --memory memory -o edited --device cpu -q", reads="edited"),
    "delta": Command("export --memory memory -o part --format delta --device cpu -q", reads="part"),
    "verify": Command("verify memory", reads="memory"),
    "log": Command("log memory", reads="memory"),
    "inspect": Command("inspect memory", reads="memory"),
}
# First a pair of each kind: two that add, one that adds and one that takes out or merges, and one that reads beside.
TYPICAL = [
    ("into two", "into three"),
    ("into two", "remove"),
    ("remove", "merge"),
    ("merge", "export"),
    ("remove", "log"),
]
PAIRS = [*TYPICAL, *((one, other) for one in list(COMMANDS)[:4] for other in COMMANDS if one != other)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, edits, shards and a memory of two edits."""
    root = tmp_path_factory.mktemp("two-writers")
    model = str(save_tiny(root / "model"))
    for name, number in (("two", 2), ("three", 3)):
        write(root / f"{name}.jsonl", [fact(number)])
    (root / "wise.toml").write_text("[edit]\nunrelated-texts = 16\n")
    edit(model, write(root / "four.jsonl", [fact(4)]), root / "shards", EditSettings(**FLAGS), load=CPU)
    batch = batch_from(write(root / "first.jsonl", [fact(0), fact(1)]))
    edit_into(IntoMemory(model, root / "memory", FLAGS, load=CPU), batch)
    return root


def both(processes: list[Forked], lines: list[str], pause: float) -> list[int]:
    """The exit codes of two commands, the second of which starts a little later."""
    processes[0].start(lines[0])
    time.sleep(pause)
    processes[1].start(lines[1])
    return [one.ended() for one in processes]


def test_commands_at_once_lose_nothing(
    root: Path,
    forks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sweep: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """Scheduled jobs on one memory: two of them start at once, or an export runs while a release is made."""
    processes, here = [Forked(forks, tmp_path / name) for name in ("one", "other")], tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    chance, refused, count = random.Random(8), 0, sweep(len(TYPICAL), 50)
    for number in range(count):
        for path in here.iterdir():
            shutil.rmtree(path)
        shutil.copytree(root / "memory", "memory")
        pair = [COMMANDS[name] for name in (PAIRS[number] if number < len(PAIRS) else chance.choice(PAIRS))]
        lines = [one.line.format(root=root) for one in pair]
        order = chance.sample([0, 1], 2)
        codes = both(processes, [lines[place] for place in order], chance.uniform(0, LONGEST))
        for place, code in zip(order, codes, strict=True):
            assert code in ((0,) if pair[place].reads else (0, 2)), (lines, codes, errors(processes))
            if code:
                refused += 1
                assert "another process is writing memory" in errors(processes)
                assert processes[0].run(lines[place]) == 0, errors(processes)
        expected = {"e0", "e1"}
        for one in pair:
            expected = (expected | one.brings) - one.takes
        assert {edit.id for edit in read_manifest(Path("memory")).edits} == expected
        assert verify(Path("memory")).differences == ()
        assert len(log(Path("memory")).releases) == 1 + sum(not one.reads for one in pair)
        for one in pair:
            if one.reads in ("edited", "part"):
                require_one_release(Path(one.reads), root, one.line.format(root=root), processes[0], expected)
        assert {path.name for path in here.iterdir()} <= {"memory", "edited", "part"}
    record_property("interleavings", f"{count}, {refused} commands refused and run again")


def require_one_release(export: Path, root: Path, line: str, process: Forked, newest: set[str]) -> None:
    """Check that an export is whole, of a release that there was, and that it knows of which."""
    assert verify(export, model=str(root / "model")).differences == ()
    found = {edit.id for edit in read_manifest(export).edits}
    assert found in ({"e0", "e1"}, newest)
    assert process.run(line) == (0 if found == newest else 2)


def errors(processes: list[Forked]) -> str:
    return "".join(one.errors.read_text()[-4000:] for one in processes)


def test_whoever_follows_a_file_waits_for_others(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long-running watchers: a `remove` beside them ended them, and the lines that had come were never taken in."""
    memory = tmp_path / "memory"
    shutil.copytree(root / "memory", memory)
    lock, waited = threading.Event(), []

    def hold() -> None:
        with release_log.changing(memory):
            lock.set()
            time.sleep(0.5)

    other = threading.Thread(target=hold)
    other.start()
    assert lock.wait(10)
    with pytest.raises(BusyError), release_log.changing(memory):
        pass
    looks = iter([True] * 500)
    following = follow(
        IntoMemory(str(root / "model"), memory, FLAGS, load=CPU),
        root / "two.jsonl",
        interval=0.02,
        goes_on=lambda: next(looks),
        on_progress=lambda event: waited.append(event.note),
    )
    assert next(following).held == 3
    other.join()
    assert "for who is changing memory" in waited
