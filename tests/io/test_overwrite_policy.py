import os
from pathlib import Path

import pytest

from wisecli.errors import OutputExistsError, ProtectedOutputError
from wisecli.io.overwrite_policy import Output

MARK = "shards.json"


def filled(directory: Path, name: str = MARK) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("{}")
    return directory


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_there_or_is_empty_may_be_written(tmp_path: Path, *, force: bool) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "deep/new", "empty"):
        Output(tmp_path / name, (MARK,), force=force).require()


def test_a_former_output_is_replaced_only_with_force(tmp_path: Path) -> None:
    output = filled(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force"):
        Output(output, (MARK,)).require()
    Output(output, (MARK,), force=True).require()
    Output(output, ("other.json", MARK), force=True).require()


@pytest.mark.parametrize(
    ("name", "says"),
    [("precious.txt", "holds no shards.json, so it was not written by this command"), ("router.json", "holds no")],
)
def test_a_foreign_directory_is_never_replaced(tmp_path: Path, name: str, says: str) -> None:
    output = filled(tmp_path / "out", name)
    with pytest.raises(ProtectedOutputError, match=says):
        Output(output, (MARK,), force=True).require()
    assert (output / name).is_file()


def test_a_file_or_a_link_to_a_foreign_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    filled(tmp_path / "there", "precious.txt")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(ProtectedOutputError):
            Output(tmp_path / name, (MARK,), force=True).require()


def test_what_bears_the_mark_of_something_more_is_never_replaced(tmp_path: Path) -> None:
    output = filled(filled(tmp_path / "out"), "config.json")
    with pytest.raises(ProtectedOutputError, match=r"holds config\.json"):
        Output(output, (MARK,), never=("config.json",), force=True).require()


def test_neither_an_input_nor_what_holds_or_lies_in_one_is_replaced(tmp_path: Path) -> None:
    around = filled(tmp_path / "around")
    inside = filled(around / "input" / "inside")
    source = filled(around / "input")
    for output, says in ((source, "is an input"), (around, "holds .*an input"), (inside, "lies in .*an input")):
        with pytest.raises(ProtectedOutputError, match=says):
            Output(output, (MARK,), (source,), force=True).require()
        with pytest.raises(ProtectedOutputError, match=says):
            Output(output, (), (source,)).require_apart()
    Output(filled(tmp_path / "beside"), (MARK,), (source,), force=True).require()


def test_an_input_is_known_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = filled(tmp_path / "source")
    (tmp_path / "alias").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for output in (Path("source"), Path("alias"), Path("./source")):
        with pytest.raises(ProtectedOutputError, match="is an input"):
            Output(output, (MARK,), (tmp_path / "alias",), force=True).require()


def test_neither_the_current_directory_nor_home_nor_what_holds_them_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = filled(tmp_path / "a" / "here"), filled(tmp_path / "b" / "home")
    filled(tmp_path / "a"), filled(tmp_path / "b")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for output in (Path(), here, here.parent, Path(".."), home, home.parent):
        with pytest.raises(ProtectedOutputError, match=r"the current directory|your home directory"):
            Output(output, (MARK,), force=True).require()
    Output(filled(here / "below"), (MARK,), force=True).require()


def test_a_mount_point_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = filled(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    with pytest.raises(ProtectedOutputError, match="mount point"):
        Output(output, (MARK,), force=True).require()
