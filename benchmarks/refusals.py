"""How long refusals take, against a Python that does nothing: each is the best of several runs of a process of its own.

python benchmarks/refusals.py [--runs 9]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What is refused, by the arguments of `wise`.
REFUSALS: dict[str, tuple[str, ...]] = {
    "no such file": ("edit", "model", "nowhere.jsonl"),
    "empty file": ("edit", "model", "empty.jsonl"),
    "malformed line": ("edit", "model", "malformed.jsonl"),
    "malformed, into a memory": ("edit", "model", "malformed.jsonl", "--into", "memory"),
    "unknown flag": ("edit", "model", "edits.jsonl", "--pases", "3"),
    "value of the wrong kind": ("edit", "model", "edits.jsonl", "--set", "passes=many"),
    "value out of bounds": ("edit", "model", "edits.jsonl", "--set", "passes=0"),
    "foreign output": ("edit", "model", "edits.jsonl", "-o", "foreign"),
    "foreign output, forced": ("edit", "model", "edits.jsonl", "-o", "foreign", "--force"),
    "foreign output of a merge": ("merge", "shards", "-o", "foreign"),
    "foreign output of an export": ("export", "model", "-o", "foreign"),
}


def make_places(root: Path) -> None:
    """Files to be refused."""
    (root / "edits.jsonl").write_text('{"prompt": "ba", "target": "do"}\n')
    (root / "malformed.jsonl").write_text('{"prompt": "ba", "target"\n')
    (root / "empty.jsonl").write_text("")
    (root / "foreign").mkdir()
    (root / "foreign" / "letter.txt").write_text("keep me")


def best(command: list[str], root: Path, runs: int, code: int) -> float:
    """Seconds of the fastest of several runs, each of which must end with an exit code."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=root, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()}")
    return min(seconds)


def measure(runs: int) -> tuple[float, dict[str, float]]:
    """Seconds of a Python that does nothing, and of each refusal."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_places(root)
        nothing = best([sys.executable, "-c", "pass"], root, 3 * runs, 0)
        wise = [sys.executable, "-m", "wisecli"]
        return nothing, {name: best([*wise, *line], root, runs, 2) for name, line in REFUSALS.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    nothing, refusals = measure(parser.parse_args().runs)
    print(f"| refused | ms | times `python -c pass` ({1000 * nothing:.0f} ms) |\n|---|--:|--:|")
    for name, seconds in refusals.items():
        print(f"| {name} | {1000 * seconds:.0f} | {seconds / nothing:.1f} |")


if __name__ == "__main__":
    main()
