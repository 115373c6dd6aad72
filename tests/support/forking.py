"""Commands in processes that start at once and can be killed at any moment: forked off one that has all imported."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# Takes what a process is called with and its standard streams, and answers with the number of a fork that runs it and,
# when that has ended, with its exit code. It may be told to kill itself at a step on the file system.
_SERVER = """
import gc
gc.disable()
import atexit, importlib, json, os, pkgutil, signal, socket, sys
import torch
torch.set_num_threads(1)
import pydantic.type_adapter, rich.table, transformers.models.llama.modeling_llama, torch._dynamo
from transformers import AutoTokenizer, conversion_mapping
import wisecli
from wisecli import cli

for package in ("artifacts", "cli", "commands", "editing", "evaluation", "export", "memory", "models", "routing"):
    for module in pkgutil.walk_packages([f"{wisecli.__path__[0]}/{package}"], f"wisecli.{package}."):
        importlib.import_module(module.name)
conversion_mapping.get_checkpoint_conversion_mapping("llama")  # made of a thousand patterns, once a process
gc.freeze()
gc.enable()

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


def run(called, streams):
    # Whatever started the tests in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(called["cwd"])
    os.environ.clear()
    os.environ.update(called["environment"])
    if "program" in called:
        exec(called["program"], {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    sys.argv = ["wise", *called["arguments"]]
    steps = None if called["steps"] is None else count_steps(called["steps"])
    try:
        cli.main()
    except SystemExit as stopped:
        if steps:
            print("steps", steps(), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # that is all of a process's end that counts, and the rest takes seconds
        os._exit(stopped.code or 0)


def answer(asking, called, streams):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        asking.close()
        run(called, streams)
    with asking.makefile("w") as told:
        print(child, file=told, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=told, flush=True)
    os._exit(0)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    print("ready", flush=True)
    while True:
        asking, _ = listening.accept()
        message, streams, _, _ = socket.recv_fds(asking, 1 << 20, 3)
        called = json.loads(message)
        if called is None:
            os._exit(0)  # the usual end takes seconds
        if not os.fork():
            listening.close()
            answer(asking, called, streams)
        asking.close()
        for stream in streams:
            os.close(stream)
"""

_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect({address!r})
    called = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ), "steps": None}}
    socket.send_fds(asking, [json.dumps(called).encode()], [0, 1, 2])
    code = int(asking.makefile().readlines()[1])
sys.exit(code & 255)
"""


@contextmanager
def fork_server(root: Path) -> Iterator[Path]:
    """A directory with an executable `wise` for scripts, and with the socket that a ``Forked`` asks."""
    address = str(root / "socket")
    command = [sys.executable, "-c", _SERVER, address]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    (root / "wise").write_text(_CLIENT.format(python=sys.executable, address=address))
    (root / "wise").chmod(0o755)
    yield root
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(address)
        asking.sendall(json.dumps(None).encode())
    server.communicate()


def _asked(address: str, called: dict[str, Any], streams: list[int], environment: dict[str, str]) -> TextIO:
    """What a server says of a process: its number, and its exit code when that has ended."""
    called = {**called, "cwd": str(Path.cwd()), "environment": {**os.environ, **environment}}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(address)
        socket.send_fds(asking, [json.dumps(called).encode()], streams)
        return asking.makefile()


class ForkedProgram:
    """A program in Python that is talked with line by line."""

    def __init__(self, server: Path, program: str) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            streams = [theirs.fileno(), theirs.fileno(), sys.__stderr__.fileno() if sys.__stderr__ else 2]
            self._told = _asked(str(server / "socket"), {"program": program}, streams, {})
            self.stream = ours.makefile("rw")
        self._number = int(self._told.readline())

    def tell(self, line: str) -> None:
        self.stream.write(f"{line}\n")
        self.stream.flush()

    def kill(self) -> None:
        os.kill(self._number, signal.SIGKILL)

    def ended(self) -> tuple[str, int]:
        """What it said to the end, and its exit code."""
        with self.stream, self._told:
            return self.stream.read(), int(self._told.readline())


class Forked:
    """Runs one command at a time in the current directory, and says how it ended.

    Args:
        server: the directory of a server.
        errors: what commands say goes to its end.
        environment: of commands, beside this process'.
    """

    def __init__(self, server: Path, errors: Path, environment: dict[str, str] | None = None) -> None:
        self.errors, self._address, self._environment = errors, str(server / "socket"), environment or {}
        self.errors.touch()

    def start(self, line: str, *, steps: int | None = None) -> int:
        """The number of the process of a command."""
        called = {"arguments": shlex.split(line), "steps": steps}
        with Path(os.devnull).open("r+") as nothing, self.errors.open("a") as errors:
            streams = [nothing.fileno(), nothing.fileno(), errors.fileno()]
            self._told = _asked(self._address, called, streams, self._environment)
        return int(self._told.readline())

    def ended(self) -> int:
        """The exit code of the command that was started."""
        with self._told:
            return int(self._told.readline())

    def run(self, line: str, *, steps: int | None = None) -> int:
        self.start(line, steps=steps)
        return self.ended()

    def steps(self, line: str) -> int:
        """How many times a command opens, makes, renames, lists or removes something."""
        assert self.run(line, steps=0) == 0, self.errors.read_text()
        return int(re.findall(r"steps (\d+)", self.errors.read_text())[-1])

    def kill_at(self, step: int, line: str) -> int:
        """The exit code of a command that is killed at such a step."""
        return self.run(line, steps=step)
