"""What disks, terminals, limits and models of the user's do wrong ends in one sentence and the documented exit code."""

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.ready import Ready
from support.tiny_models import Outcome, Wise

from wisecli.cli.console import show_all_letters
from wisecli.memory.history import release_log


def require_sentence(outcome: Outcome, *says: str) -> None:
    assert outcome.code == 2
    *_, last = outcome.err.splitlines()
    assert last.startswith("error: ")
    assert "fault in wise" not in last
    assert all(one in last for one in says), last


def test_an_empty_prompt_and_one_that_is_too_long(wise: Wise, ready: Ready) -> None:
    for command in ("generate", "explain"):
        require_sentence(wise(command, ready.model, "", "--memory", ready.memory), "nothing of the prompt ''; reword")
    long = " ".join(["ba"] * 3000)
    require_sentence(
        wise("generate", ready.model, long, "--memory", ready.memory), "3,000 tokens, the model takes 2,048"
    )


def test_a_chat_template_that_raises(wise: Wise, ready: Ready) -> None:
    shutil.copytree(ready.model, "model")
    Path("model/chat_template.jinja").write_text("{{ raise_exception('only for [two]') }}")
    for line in ("edit model {edits} --chat", "edit model {edits} --chat --dry-run"):
        require_sentence(wise(*line.format(edits=ready.edits).split()), "chat template", "only for [two]", "--chat")


@pytest.mark.parametrize("place", ["file/out", "file/deep/out"])
def test_an_output_below_a_file(wise: Wise, ready: Ready, place: str) -> None:
    Path("file").write_text("keep me")
    for line in (
        "edit {model} {edits} -o",
        "merge {shards} -o",
        "export --memory {memory} -o",
        "edit {model} {edits} --into",
    ):
        filled = line.format(model=ready.model, edits=ready.edits, shards=ready.shards, memory=ready.memory)
        require_sentence(wise(*filled.split(), place), "file")
    require_sentence(wise("edit", ready.model, ready.edits, "--into", "file"), "file")
    assert Path("file").read_text() == "keep me"


@pytest.mark.parametrize(("number", "says"), [(27, "File too large"), (28, "no space left"), (122, "quota")])
def test_a_disk_that_takes_no_more(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: something (os error {number})")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    require_sentence(wise("edit", ready.model, ready.edits), says)
    require_sentence(wise("merge", ready.shards), says)


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_memory_that_cannot_be_written(
    wise: Wise, ready: Ready, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(release_log, "changing", refuse)
    monkeypatch.setattr("wisecli.commands.edit.edit_into.changing", refuse)
    require_sentence(wise("edit", ready.model, ready.edits, "--into", "memory"), "memory", os.strerror(number))


@pytest.mark.thorough
def test_a_limit_on_the_size_of_files(ready: Ready, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    for line in (["edit", ready.model, ready.edits], ["merge", ready.shards], ["export", "--memory", ready.memory]):
        command = [sys.executable, "-m", "wisecli", *line, "-o", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
        require_sentence(Outcome(done.returncode, done.stdout, done.stderr), "too large")
        assert list(tmp_path.iterdir()) == []


def test_letters_that_a_terminal_does_not_have_are_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show_all_letters()
    sys.stdout.write("1 edit → é\n")
    sys.stdout.flush()
    assert raw.getvalue() == b"1 edit \\u2192 \\xe9\n"


def test_what_is_printed_goes_nowhere() -> None:
    command = f"exec {sys.executable} -m wisecli --help"
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, check=False)
    require_sentence(Outcome(full.returncode, "", full.stderr), "standard output: No space left on device")
    assert full.stderr.count("\n") == 1
    closed = subprocess.run(f"({command}) | true", shell=True, capture_output=True, text=True, check=False)
    assert closed.stderr == ""
