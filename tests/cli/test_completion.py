"""What the shells propose, asked of the shells themselves; names that are kept for them; and how light it all is."""

import os
import select
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.light import light_runs
from support.tiny_models import Wise

from wisecli.bench.compare import WISE_METHODS
from wisecli.bench.methods import load_methods
from wisecli.bench.methods.base import METHODS
from wisecli.bench.studies import load_studies
from wisecli.bench.studies.base import STUDIES
from wisecli.cli import choices
from wisecli.cli.choices import one_of, some_of
from wisecli.commands.measure.fetch import MODELS
from wisecli.edits.reading.field_names import BENCHMARKS
from wisecli.memory.merging.merge_methods import METHODS as MERGE_METHODS

# Lines of a shell, and all that is proposed for their last word.
PROPOSED: dict[str, set[str]] = {
    "wise ver": {"verify"},
    "wise edit --sig": {"--sign", "--signer", "--signer-identity"},
    "wise edit --set mask": {"mask_ratio=", "mask_kind=", "masks="},
    "wise eval --no-g": {"--no-generate"},
    "wise edit model edits.jsonl --device ": {"auto", "cpu", "cuda", "mps"},
    "wise edit --set writer=": {"writer=solve", "writer=gradient"},
    "wise edit --preset p": {"paper"},
    "wise edit --on-conflict ": {"error", "latest", "skip"},
    "wise edit --dtype b": {"bfloat16"},
    "wise merge shards --mode ": {"lookup", "merge", "retrieve"},
    "wise merge --method dare": {"dare", "dare-ties"},
    "wise merge --set threshold=m": {"threshold=minimum"},
    "wise export --format ": {"routed", "merged", "stock", "gguf", "delta"},
    "wise eval --dataset z": {"zsre"},
    "wise bench model --dataset zsre,": {"zsre,counterfact", "zsre,wikibigedit", "zsre,hallucination", "zsre,temporal"},
    "wise bench model --methods wise,memit": {"wise,memit", "wise,memit-mass"},
    "wise bench model --study s": {"scaling", "shards"},
    "wise fetch ": {"smollm2-135m", "zsre", "counterfact", "wikibigedit"},
}
SOME = ("wise edit --on-conflict ", "wise merge shards --mode ", "wise fetch ")
INSTALLED = {"bash": ".bash_completions/wise.sh", "zsh": ".zfunc/_wise", "fish": ".config/fish/completions/wise.fish"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which `wise` is this package's, at home in an empty directory."""
    tmp_path = tmp_path_factory.mktemp("shells")
    program = tmp_path / "bin" / "wise"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wisecli "$@"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "home").mkdir()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "config")}


def ask(shell: str, script: str, environment: dict[str, str]) -> str:
    """What a shell prints, without its user's settings."""
    bare = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = [shell, *bare, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    return done.stdout


def script_of(shell: str, environment: dict[str, str]) -> Path:
    """The file of a shell's completion script, written when it is first asked for."""
    path = Path(environment["HOME"]) / f"completion.{shell}"
    if not path.exists():
        path.write_text(ask(shell, "wise --show-completion; true", environment), encoding="utf-8")
    return path


def words_of(line: str) -> Sequence[str]:
    return line.split(" ")


def quoted(words: Sequence[str]) -> str:
    return " ".join(f"'{word}'" for word in words)


def asking(line: str) -> dict[str, str]:
    """The environment in which `wise` says what bash proposes."""
    return {"_WISE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words_of(line)) - 1)}


@pytest.mark.parametrize("line", PROPOSED)
def test_what_is_proposed(wise: Wise, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    for name, value in asking(line).items():
        monkeypatch.setenv(name, value)
    assert set(wise().out.split()) == PROPOSED[line]


@pytest.mark.parametrize("line", SOME)
def test_bash_completes(environment: dict[str, str], line: str) -> None:
    words = words_of(line)
    script = (
        f"source {script_of('bash', environment)}\n"
        'function=$(complete -p wise | sed "s/.*-F \\([^ ]*\\) .*/\\1/")\n'
        f"COMP_WORDS=({quoted(words)}); COMP_CWORD={len(words) - 1}\n"
        '"$function" wise\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(ask("bash", script, environment).split()) == PROPOSED[line]


def test_bash_goes_on_with_files_where_nothing_is_proposed(environment: dict[str, str]) -> None:
    script = (
        f"source {script_of('bash', environment)}\ncomplete -p wise\nCOMP_WORDS=(wise inspect ./m); COMP_CWORD=2\n"
        '_wise_completion wise\necho "${#COMPREPLY[@]}"'
    )
    first, number = ask("bash", script, environment).splitlines()
    assert "-o default" in first
    assert number == "0"


@pytest.mark.parametrize("line", SOME)
def test_fish_completes(environment: dict[str, str], line: str) -> None:
    proposed = ask("fish", f"source {script_of('fish', environment)}; complete -C '{line}'", environment).splitlines()
    assert {one.partition("\t")[0] for one in proposed} == PROPOSED[line]


def test_fish_describes_every_proposal_on_its_own_line(environment: dict[str, str]) -> None:
    narrow = {**environment, "COLUMNS": "40"}
    script = f"source {script_of('fish', environment)}; complete -C 'wise merge --mo'"
    assert [one.split("\t")[0] for one in ask("fish", script, narrow).splitlines()] == ["--mode", "--model"]


def tabs_in_zsh(line: str, environment: dict[str, str]) -> list[str]:
    """What zsh lists on a terminal, after a line and two tabs."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    # The prompt that is waited for is put together, so that it is not in what is typed.
    start = "autoload -U compinit; compinit -u -D; setopt no_always_last_prompt"
    ready = "PS1='REA''DY> '"
    ours, theirs = os.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "dumb", "LISTMAX": "1000"},
        start_new_session=True,
    )
    try:
        os.write(ours, f"{start}; source {script_of('zsh', environment)}; {ready}\n".encode())
        read_until(ours, b"READY> ")
        os.write(ours, f"{line}\t\t".encode())
        return read_until(ours, b"READY> ").decode().split("\n")[1:-1]
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(theirs)


def read_until(terminal: int, marker: bytes) -> bytes:
    """What comes from a terminal up to the marker."""
    read, end = b"", time.monotonic() + 60
    while marker not in read:
        ready, _, _ = select.select([terminal], [], [], max(end - time.monotonic(), 0))
        if not ready:
            pytest.fail(f"{marker!r} does not come: {read!r}")
        read += os.read(terminal, 65536)
    return read


@pytest.mark.parametrize("line", SOME)
def test_zsh_completes(environment: dict[str, str], line: str) -> None:
    assert set(" ".join(tabs_in_zsh(line, environment)).split()) == PROPOSED[line]


def test_zsh_lists_options_with_their_texts(environment: dict[str, str]) -> None:
    listed = tabs_in_zsh("wise merge --de", environment)
    assert [row.split()[0] for row in listed] == ["--density"]
    assert "Share of entries kept. [default: 0.5]" in listed[0]


@pytest.mark.parametrize("shell", INSTALLED)
def test_completion_is_installed_at_home(environment: dict[str, str], shell: str) -> None:
    shown = script_of(shell, environment).read_text(encoding="utf-8")
    said = ask(shell, "wise --install-completion; true", environment)
    assert f"{shell} completion installed" in said
    assert (Path(environment["HOME"]) / INSTALLED[shell]).read_text(encoding="utf-8").strip() == shown.strip()


def test_completing_imports_no_torch() -> None:
    lines = ("wise edit --", "wise merge --method ", "wise bench model --methods ", "wise fetch ")
    for run in light_runs([()] * len(lines), environments=map(asking, lines)):
        assert run.code == 0, run.err
        assert run.out.split()
        assert not {"torch", "transformers"} & run.modules


def test_names_kept_for_completion_are_those_that_are_registered() -> None:
    load_methods()
    load_studies()
    assert set(choices.BENCH_METHODS) == {*WISE_METHODS, *METHODS}
    assert set(choices.STUDIES) == STUDIES.keys()
    assert set(choices.MERGE_METHODS) == {*MERGE_METHODS, "exact"}
    assert tuple(MODELS) == choices.MODELS
    assert (*choices.DATASETS, *choices.FILED_DATASETS) == tuple(BENCHMARKS)
    assert tuple(name for name, one in BENCHMARKS.items() if one.repository) == choices.DATASETS


def test_one_name_and_several() -> None:
    assert one_of(("one", "two"))("t") == ["two"]
    assert some_of(("one", "two", "three"))("one,t") == ["one,two", "one,three"]
    assert some_of(("one", "two"))("") == ["one", "two"]
