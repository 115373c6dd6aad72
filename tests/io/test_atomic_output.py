from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from wisecli.errors import NoSpaceError, OutputExistsError
from wisecli.io.atomic_output import refuse_existing, require_space, whole_directory

DiskUsage = namedtuple("DiskUsage", "total used free")


def hidden_files(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_a_directory_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with whole_directory(output) as working:
        (working / "one").write_text("1")
        (working / "two").write_text("2")
        assert not output.exists()
        assert working.parent == output.parent
    assert {path.name: path.read_text() for path in output.iterdir()} == {"one": "1", "two": "2"}
    assert output.stat().st_mode & 0o777 == 0o755
    assert not working.exists()
    assert not hidden_files(output.parent)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, PermissionError])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_is_left_and_nothing_is_lost_when_the_block_breaks_off(
    tmp_path: Path, error: type[BaseException], *, existing: bool
) -> None:
    output = tmp_path / "out"
    if existing:
        output.mkdir()
        (output / "old").write_text("kept")
    with pytest.raises(error), whole_directory(output, force=True) as working:
        (working / "one").write_text("1")
        raise error
    assert not hidden_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "old"] if existing else [])


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_with_force_the_old_output_is_replaced(tmp_path: Path, kind: str) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if kind == "directory":
        (output / "nested").mkdir(parents=True)
        (output / "nested" / "old").write_text("old")
    elif kind == "file":
        output.write_text("old")
    else:
        elsewhere.mkdir()
        (elsewhere / "old").write_text("kept")
        output.symlink_to(elsewhere)
    with whole_directory(output, force=True) as working:
        (working / "new").write_text("new")
    assert [path.name for path in output.iterdir()] == ["new"]
    assert not hidden_files(tmp_path)
    assert kind != "link" or (elsewhere / "old").read_text() == "kept"


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_existing_output_is_refused_before_the_block_begins(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "directory":
        output.mkdir()
        (output / "old").write_text("kept")
    else:
        output.write_text("kept")
    entered = False
    with pytest.raises(OutputExistsError, match="--force"), whole_directory(output):
        entered = True
    assert not entered
    assert (output / "old" if kind == "directory" else output).read_text() == "kept"
    with pytest.raises(OutputExistsError):
        refuse_existing(output, force=False)
    refuse_existing(output, force=True)


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with whole_directory(output) as working:
        (working / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_full_disk_inside_the_block_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(NoSpaceError, match=f"no space left on the disk of {tmp_path / 'out'}"),
        whole_directory(tmp_path / "out") as working,
    ):
        (working / "one").write_text("1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_really_full_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError), whole_directory(tmp_path / "out"), Path("/dev/full").open("w") as stream:
        stream.write("x")
    assert not list(tmp_path.iterdir())


# --- free space ---


@pytest.mark.parametrize(("free", "enough"), [(999_999, False), (1_000_000, True), (1_000_001, True)])
def test_free_space_is_checked_where_the_output_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, *, enough: bool
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> DiskUsage:
        asked.append(Path(path))
        return DiskUsage(10**9, 10**9 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    output = tmp_path / "not" / "there" / "out"
    if enough:
        require_space(output, 1_000_000)
    else:
        with pytest.raises(NoSpaceError, match="1 MB needed, 1 MB free"):
            require_space(output, 1_000_000)
    assert asked == [tmp_path]


def test_no_disk_holds_an_exabyte(tmp_path: Path) -> None:
    require_space(tmp_path / "out", 1)
    with pytest.raises(NoSpaceError):
        require_space(tmp_path / "out", 10**18)
