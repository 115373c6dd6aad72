from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wisecli.editing.claims import Claims, is_claim

# Claims some shards, says so, and waits to be told to go on.
CLAIMING = """
import sys
from pathlib import Path
from wisecli.editing.claims import Claims

claims = Claims(Path(sys.argv[1]))
print(claims.hold(range(int(sys.argv[2]), int(sys.argv[3]))), flush=True)
sys.stdin.readline()
claims.release()
"""


def start(directory: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIMING, str(directory), str(first), str(last)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["release", "kill"])
def test_no_two_processes_hold_the_same_shard_and_a_claim_dies_with_its_process(tmp_path: Path, end: str) -> None:
    with start(tmp_path / "work", 2, 6) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "True\n"
        claims = Claims(tmp_path / "work")
        for numbers, free in ((range(5, 8), False), (range(3), False), (range(6, 9), True), (range(2), True)):
            assert claims.hold(numbers) == free
        assert claims.hold(range(0))
        assert not claims.hold(range(9))
        if end == "kill":
            other.kill()
        else:
            other.communicate("\n")
        other.wait()
    assert claims.hold(range(9))
    claims.release()
    assert Claims(tmp_path / "work").hold(range(9))


def test_a_thousand_shards_take_one_file(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    assert claims.hold(range(1000))
    assert sum(path.name.startswith("claim-") for path in tmp_path.iterdir()) == 1
    assert all(is_claim(path.name) for path in tmp_path.iterdir())
    assert not is_claim("shard-00001.json")


def test_what_was_finished_meanwhile_is_not_taken_for_what_was_begun(tmp_path: Path) -> None:
    directory = tmp_path / "work"
    claims = Claims(directory)
    assert claims.hold(range(2))
    with claims.alone() as current:
        assert current
    shutil.rmtree(directory)
    with claims.alone() as current:
        assert not current
    claims.release()
    assert not directory.exists()
    again = Claims(directory)
    with claims.alone() as current:
        assert not current
    with again.alone() as current:
        assert current
