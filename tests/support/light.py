"""What commands import: each is run in a process of its own, which begins with the command line alone."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

# Forks for every line, as nothing slow is imported before; tells what became of each.
_PROGRAM = """
import io, json, os, sys
from wisecli.cli.app import main

for line, environment in json.loads(sys.argv[1]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    os.environ.update(environment)
    told, code = sys.stdout, 0
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    sys.argv = ["wise", *line]
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
    said = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    print(json.dumps([code, *said, sorted(sys.modules)]), file=told, flush=True)
    os._exit(0)
"""


class Run(NamedTuple):
    """How a command ended, what it said, and the modules that were imported then."""

    code: int
    out: str
    err: str
    modules: set[str]


def light_runs(
    lines: Sequence[Sequence[str]], cwd: Path | None = None, environments: Iterable[Mapping[str, str]] = repeat({})
) -> list[Run]:
    """What became of each line, the arguments of `wise`, in an environment of its own."""
    given = list(zip(lines, environments, strict=False))
    command = [sys.executable, "-c", _PROGRAM, json.dumps(given)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    runs = [json.loads(told) for told in done.stdout.splitlines()]
    assert len(runs) == len(lines), done.stderr
    return [Run(code, out, err, set(modules)) for code, out, err, modules in runs]
