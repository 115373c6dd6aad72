import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wisecli.editing.run.shard_locks import ShardLocks, is_lock_file

# Claims some shards, says so, and waits to be told to go on.
CLAIMING = """
import sys
from pathlib import Path
from wisecli.editing.run.shard_locks import ShardLocks

claims = ShardLocks(Path(sys.argv[1]))
print(claims.acquire(range(int(sys.argv[2]), int(sys.argv[3]))), flush=True)
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
        claims = ShardLocks(tmp_path / "work")
        for numbers, free in ((range(5, 8), False), (range(3), False), (range(6, 9), True), (range(2), True)):
            assert claims.acquire(numbers) == free
        assert claims.acquire(range(0))
        assert not claims.acquire(range(9))
        if end == "kill":
            other.kill()
        else:
            other.communicate("\n")
        other.wait()
    assert claims.acquire(range(9))
    claims.release()
    assert ShardLocks(tmp_path / "work").acquire(range(9))


def test_a_thousand_shards_take_one_file(tmp_path: Path) -> None:
    claims = ShardLocks(tmp_path)
    assert claims.acquire(range(1000))
    assert sum(path.name.startswith("claim-") for path in tmp_path.iterdir()) == 1
    assert all(is_lock_file(path.name) for path in tmp_path.iterdir())
    assert not is_lock_file("shard-00001.json")


def test_what_was_finished_meanwhile_is_not_taken_for_what_was_begun(tmp_path: Path) -> None:
    directory = tmp_path / "work"
    claims = ShardLocks(directory)
    assert claims.acquire(range(2))
    with claims.exclusive() as current:
        assert current
    shutil.rmtree(directory)
    with claims.exclusive() as current:
        assert not current
    claims.release()
    assert not directory.exists()
    again = ShardLocks(directory)
    with claims.exclusive() as current:
        assert not current
    with again.exclusive() as current:
        assert current
