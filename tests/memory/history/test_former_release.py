import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import save_tiny
from support.history import FLAGS, fact, write
from support.loading import CPU

from wisecli.artifacts.checksums import write_checksums
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.memory.merge import merge
from wisecli.commands.memory.merge_into import merge_into
from wisecli.commands.memory.remove import remove
from wisecli.commands.memory.rollback import rollback
from wisecli.config import EditSettings, MergeSettings
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError
from wisecli.io.safetensors_header import read_header
from wisecli.memory.fitting import unrelated_texts
from wisecli.memory.history.former_release import former_memory
from wisecli.memory.history.open_memory import OpenMemory
from wisecli.memory.history.release_log import HISTORY, PROBS_NAME
from wisecli.memory.merging import quick_cosines
from wisecli.memory.merging.merger import Merger
from wisecli.memory.merging.removal import without

HELD = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of twenty edits, and shards of two more: of one that is like none of them, and of a near name."""
    place = tmp_path_factory.mktemp("former")
    save_tiny(place / "model")
    shards(place, "held", [fact(number) for number in range(HELD)])
    near = replace(fact(3), id="near", prompt=f"{fact(3).prompt} the", target="other")
    shards(place, "further", [fact(HELD), near])
    merge([place / "held"], place / "memory", MergeSettings())
    return place


def shards(place: Path, name: str, edits: Sequence[Edit]) -> None:
    file = write(place / f"{name}.jsonl", edits)
    run_edit(str(place / "model"), file, place / name, EditSettings(**FLAGS), load=CPU, options=RunOptions(force=True))


@pytest.fixture
def memory(place: Path, tmp_path: Path) -> Path:
    """A copy of the memory, which may be changed."""
    return Path(shutil.copytree(place / "memory", tmp_path / "memory"))


def next_merger(memory: Path, further: Path, **settings: float) -> tuple[dict[str, tuple[str, ...]], Merger]:
    """What a release with further shards would be made of."""
    opened = OpenMemory(memory)
    newest = opened.releases[-1]
    read = opened.reduced_shards(newest).values()
    merger = Merger([*read, without(read_shard_directory(further), ())], MergeSettings(**settings))  # type: ignore[arg-type]
    return {**newest.shards, "0002": ()}, merger


def contents(memory: Path) -> tuple[bytes, ...]:
    names = ("memory.safetensors", "router.json", f"{HISTORY}/{PROBS_NAME}")
    return tuple((memory / name).read_bytes() for name in names)


@pytest.mark.parametrize("many", [False, True])
def test_further_edits_make_the_memory_that_merging_all_anew_makes_to_the_byte(
    place: Path, memory: Path, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if many:  # unrelated texts are compared with few bits first
        monkeypatch.setattr(unrelated_texts, "_MANY", 0)
        for module in (unrelated_texts, quick_cosines):
            monkeypatch.setattr(module, "has_quick_int8", lambda: True)
        merge_into([], memory, MergeSettings())
    former = former_memory(OpenMemory(memory), *next_merger(memory, place / "further"))
    assert former is not None
    assert (former.edits, former.directories) == (HELD, 1)
    assert (former.probs.possible is not None) == many
    merge_into([place / "further"], memory, MergeSettings())
    went_on = contents(memory)
    merge_into([], memory, MergeSettings())  # without shards all is merged anew
    assert contents(memory) == went_on
    merge_into([], memory, MergeSettings(false_alarm=0.1))
    assert contents(memory) != went_on


def test_a_memory_that_lacks_probabilities_is_merged_anew(place: Path, memory: Path, tmp_path: Path) -> None:
    older = Path(shutil.copytree(memory, tmp_path / "older"))
    (older / HISTORY / PROBS_NAME).unlink()
    write_checksums(older)
    for one in (memory, older):
        merge_into([place / "further"], one, MergeSettings())
    assert contents(older) == contents(memory)


@pytest.mark.parametrize("change", ["shape", "range", "another memory"])
def test_probabilities_of_something_else_are_not_heeded(place: Path, memory: Path, change: str) -> None:
    path = memory / HISTORY / PROBS_NAME
    found = load_file(path)
    if change == "shape":
        found["other"] = found["other"][1:].clone()
    if change == "range":
        found["own"] = torch.full_like(found["own"], 1.5)
    save_file(found, path, {} if change == "another memory" else read_header(path).metadata)
    write_checksums(memory)
    assert former_memory(OpenMemory(memory), *next_merger(memory, place / "further")) is None


def test_nothing_is_taken_over_where_edits_went_or_settings_differ(place: Path, memory: Path) -> None:
    shards, merger = next_merger(memory, place / "further", strength=1.1)
    assert former_memory(OpenMemory(memory), shards, merger) is None
    shards, merger = next_merger(memory, place / "further")
    assert former_memory(OpenMemory(memory), {**shards, "0001": (fact(0).id,)}, merger) is None
    few = Merger([without(read_shard_directory(place / "further"), ())], MergeSettings())
    assert former_memory(OpenMemory(memory), {"0001": ()}, few) is None
    remove(memory, [fact(0).id])
    assert former_memory(OpenMemory(memory), *next_merger(memory, place / "further")) is not None


def test_going_back_takes_nothing_over_from_a_memory_that_was_altered(place: Path, memory: Path) -> None:
    merge_into([place / "further"], memory, MergeSettings())
    went_on = contents(memory)
    rollback(memory, "1")
    for name in ("memory.safetensors", f"{HISTORY}/{PROBS_NAME}"):
        (memory / name).write_bytes((memory / name).read_bytes()[:-1] + b"?")
    assert rollback(memory, "2").same
    assert contents(memory) == went_on


def test_altered_probabilities_are_noticed(place: Path, memory: Path) -> None:
    with (memory / HISTORY / PROBS_NAME).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DamagedFileError, match=PROBS_NAME):
        merge_into([place / "further"], memory, MergeSettings())
