"""Commands in processes that start at once, and can be killed at any moment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# Runs each line of its input as a command, after @N killed at its N-th step, in a process forked off after everything
# was imported: quick to start, and as easily killed as any.
ZYGOTE = """
import os, shlex, signal, sys
import torch
torch.set_num_threads(1)
import wisecli.commands.edit.edit_into, wisecli.commands.checkpoint.export, transformers.models.llama.modeling_llama
from transformers import AutoTokenizer
from wisecli import cli

STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.listdir", "os.scandir"}


def count_steps(last):
    done = 0

    def hook(event, _arguments):
        nonlocal done
        if event in STEPS:
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: done


for line in sys.stdin:
    child = os.fork()
    if not child:
        # Whatever started the tests in the background may have had it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        first, *words = shlex.split(line)
        steps = count_steps(int(first[1:] or 0)) if first[0] == "@" else None
        sys.argv = ["wise", *([] if steps else [first]), *words]
        sys.stdout = open(os.devnull, "w")
        try:
            cli.main()
        except SystemExit as stopped:
            if steps:
                print("steps", steps(), file=sys.stderr, flush=True)
            os._exit(stopped.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Zygote:
    """Starts commands and says how they ended."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.errors = place / "errors"
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ZYGOTE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )

    def start(self, line: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self._line())

    def ended(self) -> int:
        return int(self._line())

    def run(self, line: str) -> int:
        self.start(line)
        return self.ended()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        return line

    def steps(self, line: str) -> int:
        """How many times a command opens, makes, renames, lists or removes something."""
        assert self.run(f"@ {line}") == 0, self.errors.read_text()
        return int(re.findall(r"steps (\d+)", self.errors.read_text())[-1])

    def kill_at(self, step: int, line: str) -> int:
        """The exit code of a command that is killed at such a step."""
        return self.run(f"@{step} {line}")

    def close(self) -> None:
        self.process.communicate()
