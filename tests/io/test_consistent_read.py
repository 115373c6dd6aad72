from pathlib import Path

import pytest

from wisecli.errors import BusyError, DamagedFileError
from wisecli.io.atomic_output import whole_directory
from wisecli.io.consistent_read import read_consistently


def write(place: Path, text: str) -> None:
    with whole_directory(place, force=True) as working:
        for name in ("one", "two"):
            (working / name).write_text(text)


def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """Readers beside a writer: the first file is of the old state, the second of the new one."""
    place, states = tmp_path / "memory", iter(["b", "c"])
    write(place, "a")

    def read() -> tuple[str, str]:
        first = (place / "one").read_text()
        if (state := next(states, None)) is not None:
            write(place, state)
        second = (place / "two").read_text()
        if first != second:
            raise DamagedFileError(place, f"{first} is not {second}", "read it again")
        return first, second

    assert read_consistently(place, read) == ("c", "c")


def test_what_is_wrong_with_one_state_is_said_at_once(tmp_path: Path) -> None:
    asked = []

    def read() -> None:
        asked.append(1)
        raise DamagedFileError(tmp_path, "altered", "make it anew")

    with pytest.raises(DamagedFileError):
        read_consistently(tmp_path, read)
    with pytest.raises(DamagedFileError):
        read_consistently(tmp_path / "nowhere", read)
    assert len(asked) == 2


def test_what_never_rests_is_busy(tmp_path: Path) -> None:
    place = tmp_path / "memory"
    with pytest.raises(BusyError):
        read_consistently(place, lambda: write(place, "a"))
