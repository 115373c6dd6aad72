import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from wisecli.errors import NoSpaceError, OutputExistsError
from wisecli.io import atomic_output
from wisecli.io.atomic_output import require_space, whole_directory

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


def test_without_a_swap_in_one_step_the_old_output_comes_back_if_the_new_one_cannot_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("kept")
    monkeypatch.setattr(atomic_output, "_exchanged", lambda *_: False)
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target == output and (self / "new").exists():
            raise OSError(errno.EIO, "the disk is gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"), whole_directory(output, force=True) as working:
        (working / "new").write_text("new")
    assert (output / "old").read_text() == "kept"
    assert not hidden_files(tmp_path)
    monkeypatch.setattr(Path, "replace", replace)
    with whole_directory(output, force=True) as working:
        (working / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


# Replaces an output again and again; says so between two rounds.
REPLACING = """
import sys
from pathlib import Path
from wisecli.io import atomic_output

if sys.argv[2] == "two steps":
    atomic_output._exchanged = lambda *_: False
for number in range(10**6):
    with atomic_output.whole_directory(Path(sys.argv[1]), force=True) as working:
        for part in range(20):
            (working / f"{part}").write_text(str(number))
    print(number, flush=True)
"""


@pytest.mark.parametrize("way", ["one step", "two steps"])
def test_a_kill_at_any_moment_leaves_one_of_both_whole_and_the_next_run_nothing_else(tmp_path: Path, way: str) -> None:
    output, chance = tmp_path / "out", random.Random(3)
    for _ in range(12):
        command = [sys.executable, "-c", REPLACING, str(output), way]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 * chance.random())
            process.kill()
        if way == "one step":
            require_whole(output)
        with whole_directory(tmp_path / "out", force=True) as working:
            require_whole(output)
            shutil.copytree(output, working, dirs_exist_ok=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def require_whole(output: Path) -> None:
    contents = {path.name: path.read_text() for path in output.iterdir()}
    assert contents.keys() == {str(part) for part in range(20)}
    assert len(set(contents.values())) == 1


def test_what_another_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with whole_directory(output) as first:
        (first / "one").write_text("1")
        with whole_directory(output) as second:
            (second / "two").write_text("2")
            assert (first / "one").is_file()
        (output / "two").unlink()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "one"]


def test_nothing_is_swept_away_but_what_runs_of_this_program_leave(tmp_path: Path) -> None:
    names = (".out.backup01", ".out.old.12345678", ".outer.wise-12345678", "out.wise-12345678")
    for name in (*names, ".out.wise-12345678", ".out.wise-12345678.old"):
        (tmp_path / name).mkdir()
    with whole_directory(tmp_path / "out") as working:
        (working / "new").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names}


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
