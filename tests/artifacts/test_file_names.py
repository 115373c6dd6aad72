from pathlib import Path

import pytest

from wisecli.artifacts.file_names import what_is_at
from wisecli.errors import MemoryHistoryError, WrongDirectoryError
from wisecli.memory.history.release_log import read_history


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((), "holds nothing that `wise` wrote"),
        (("letter.txt",), "holds nothing that `wise` wrote"),
        (("config.json", "model.safetensors"), "is a model"),
        (("shards.json",), "holds shards"),
        (("router.json",), "is a memory"),
        (("router.json", "config.json"), "is a checkpoint with a router"),
        (("wise.json", "config.json"), "is a checkpoint that was exported without a router"),
        (("wise.json",), "is a checkpoint that was exported without a router"),
    ],
)
def test_a_directory_is_told_by_the_names_of_its_files(tmp_path: Path, files: tuple[str, ...], what: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert what_is_at(tmp_path) == what
    with pytest.raises(MemoryHistoryError if what == "is a memory" else WrongDirectoryError) as caught:
        read_history(tmp_path)
    assert (what in str(caught.value)) == (what != "is a memory")


def test_what_is_no_directory_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("")
    assert what_is_at(tmp_path / "letter.txt") == "is a file"
    assert what_is_at(tmp_path / "nowhere") == "does not exist"
