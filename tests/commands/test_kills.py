"""A command that is killed near its end leaves the old output or the new one, whole, and the next run no litter."""

import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.forking import Forked
from support.helpers import save_tiny
from support.history import FLAGS, batch_from, fact, write
from support.loading import CPU
from support.ready import here

from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.checkpoint.export import Publication, export
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.edit.edit import edit
from wisecli.commands.edit.edit_into import IntoMemory, edit_into
from wisecli.commands.memory.log import log
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings
from wisecli.editing.run.shard_differences import altered_files

# How much of a run counts as its end: seconds, and steps on the file system.
END, STEPS = 0.05, 80
KILLS = 30


@dataclass(frozen=True)
class Case:
    """A command that replaces something, what it replaces, and how the one is told from the other."""

    line: str
    output: str
    old: Callable[[Path, Path], object]
    state: Callable[[Path], str]


def shards_state(output: Path) -> str:
    directory = read_shard_directory(output)
    assert altered_files(directory) == []
    return str(directory.settings["seed"])


def memory_state(output: Path) -> str:
    assert verify(output).differences == ()
    return f"{read_manifest(output).merge['false_alarm']} {len(log(output).releases)}"


def export_state(output: Path) -> str:
    assert verify(output).differences == ()
    return str((output / "README.md").exists())


def old_shards(root: Path, output: Path) -> None:
    shutil.copytree(root / "old-shards", output)


def old_memory(root: Path, output: Path) -> None:
    merge([root / "shards"], output, MergeSettings(false_alarm=0.3))


def old_export(root: Path, output: Path) -> None:
    export(root / "memory", output, load=CPU, publication=Publication(card=False))


def first_release(root: Path, output: Path) -> None:
    shutil.copytree(root / "memory", output)


EDIT = "edit {root}/model {root}/edits.jsonl -o shards --force --device cpu -q --layer 2 --config {root}/wise.toml"
CASES = {
    "edit": Case(EDIT, "shards", old_shards, shards_state),
    "merge": Case("merge {root}/shards --force -q", "memory", old_memory, memory_state),
    "export": Case("export --memory {root}/memory --force --device cpu -q", "edited", old_export, export_state),
    "into": Case(
        "edit {root}/model {root}/more.jsonl --into memory --device cpu -q --config {root}/wise.toml",
        "memory",
        first_release,
        memory_state,
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: a model, edits, shards and a memory."""
    root = tmp_path_factory.mktemp("kills")
    save_tiny(root / "model")
    write(root / "edits.jsonl", [fact(0), fact(1)])
    write(root / "more.jsonl", [fact(2)])
    (root / "wise.toml").write_text("[edit]\nunrelated-texts = 16\n")
    for name, seed in (("shards", 0), ("old-shards", 5)):
        settings = EditSettings(**FLAGS, seed=seed)
        edit(str(root / "model"), root / "edits.jsonl", root / name, settings, load=CPU)
    merge([root / "shards"], root / "memory", MergeSettings())
    # What is measured once of a model and a layer is in the cache from here on.
    into_memory = IntoMemory(str(root / "model"), root / "measured", FLAGS, load=CPU)
    edit_into(into_memory, batch_from(root / "more.jsonl"))
    return root


@pytest.fixture
def forked(forks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Forked:
    """Runs commands in a directory of their own, which becomes the test's, too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Forked(forks, tmp_path / "errors")


@dataclass
class Trial:
    """A case, run again and again."""

    case: Case
    root: Path
    forked: Forked

    def __post_init__(self) -> None:
        self.line = self.case.line.format(root=self.root)
        self.output = Path(self.case.output)
        self.kept = self.root / f"kept-{self.case.old.__name__}"
        if not self.kept.exists():
            self.case.old(self.root, self.kept)
        self.reset()
        self.old = self.case.state(self.output)
        assert self.forked.run(self.line) == 0, self.forked.errors.read_text()
        self.new = self.case.state(self.output)
        assert self.old != self.new
        self.around = here()

    def reset(self) -> None:
        """Put the old output where the new one is to be."""
        for path in Path.cwd().iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        shutil.copytree(self.kept, self.output, copy_function=os.link)

    def lasts(self, runs: int) -> float:
        """Seconds from the start of a run to its end, the median of some runs."""
        taken = []
        for _ in range(runs):
            self.reset()
            started = time.perf_counter()
            assert self.forked.run(self.line) == 0, self.forked.errors.read_text()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def check(self) -> str:
        """That a killed run left one of the two, and the next one nothing else than the new one; which was left."""
        left = self.case.state(self.output)
        assert left in (self.old, self.new)
        assert self.forked.run(self.line) == 0, self.forked.errors.read_text()
        assert self.case.state(self.output) == self.new
        assert here() == self.around
        return "old" if left == self.old else "new"


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_any_step_of_its_end_leaves_the_old_or_the_new(
    root: Path, forked: Forked, name: str, sweep: Any, record_property: Callable[[str, object], None]
) -> None:
    trial = Trial(CASES[name], root, forked)
    trial.reset()
    steps = forked.steps(trial.line)
    last = range(max(1, steps - STEPS), steps + 1)
    found = []
    for step in sorted(random.Random(name).sample(last, sweep(2, len(last)))):
        trial.reset()
        assert forked.kill_at(step, trial.line) == -signal.SIGKILL, f"{step} of {steps} steps"
        found.append(trial.check())
    record_property("killed", f"{name}: at {len(found)} of the last {len(last)} steps, {found.count('new')} times new")


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_in_its_last_moments_leaves_the_old_or_the_new(
    root: Path, forked: Forked, name: str, record_property: Callable[[str, object], None]
) -> None:
    trial, chance, found = Trial(CASES[name], root, forked), random.Random(name), list[str]()
    lasts, tries = trial.lasts(5), 0
    while len(found) < KILLS:
        tries += 1
        assert tries < 1000
        trial.reset()
        child = forked.start(trial.line)
        time.sleep(max(0.0, lasts - chance.uniform(0, END)))
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(child, signal.SIGKILL)
        if forked.ended() == -signal.SIGKILL:
            found.append(trial.check())
        else:
            lasts *= 0.98
    record_property("killed", f"{name}: {len(found)} in {tries} runs of {lasts:.2f} s, {found.count('new')} times new")
