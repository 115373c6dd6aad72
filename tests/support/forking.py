"""A `wise` for scripts that starts at once: forked off a process in which everything was imported."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Takes what a process was called with and its standard streams, and answers with the exit code of a fork that ran it.
SERVER = """
import atexit, json, os, socket, sys
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
import wisecli.commands.edit.edit_into, wisecli.commands.measure.evaluate
import wisecli.commands.checkpoint.export, wisecli.commands.memory.rollback
from wisecli import cli
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    print("ready", flush=True)
    while True:
        asking, _ = listening.accept()
        message, streams, _, _ = socket.recv_fds(asking, 1 << 20, 3)
        called = json.loads(message)
        if called is None:
            break
        child = os.fork()
        if not child:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.chdir(called["cwd"])
            os.environ.clear()
            os.environ.update(called["environment"])
            sys.argv = ["wise", *called["arguments"]]
            try:
                cli.main()
            except SystemExit as stopped:
                sys.stdout.flush()
                sys.stderr.flush()
                atexit._run_exitfuncs()  # that is all of a process's end that counts, and the rest takes seconds
                os._exit(stopped.code or 0)
        for stream in streams:
            os.close(stream)
        asking.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255]))
        asking.close()
"""

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect({address!r})
    called = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(asking, [json.dumps(called).encode()], [0, 1, 2])
    (code,) = asking.recv(1)
sys.exit(code)
"""


@contextmanager
def forked_wise(root: Path) -> Iterator[Path]:
    """A directory with an executable `wise`."""
    address = str(root / "socket")
    server = subprocess.Popen([sys.executable, "-c", SERVER, address], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    (root / "bin").mkdir()
    (root / "bin" / "wise").write_text(CLIENT.format(python=sys.executable, address=address))
    (root / "bin" / "wise").chmod(0o755)
    yield root / "bin"
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(address)
        asking.sendall(json.dumps(None).encode())
    server.communicate()
