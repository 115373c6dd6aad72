"""What scripts that measure whole commands share: a command in a process of its own, and what their results are of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def wise(*arguments: str) -> dict[str, Any]:
    """Run a command of the package in a process of its own; its results."""
    command = [sys.executable, "-m", "wisecli", *arguments, "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    results: dict[str, Any] = json.loads(done.stdout)["results"]
    return results


def require_same(output: Path, given: Mapping[str, object]) -> None:
    """Keep in a directory what its results are of, ``WISE_*`` among it; end if it holds those of something else."""
    about = {name: str(value) for name, value in given.items()}
    about |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("WISE_")}
    file = output / "about.json"
    if file.is_file() and (before := json.loads(file.read_text(encoding="utf-8"))) != about:
        raise SystemExit(f"{output} holds results of {before}, not of {about}; give another -o")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
