"""Models to test on, tiny ones of every architecture and a real one with its chain of outputs; the command line."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, dynamic_module_utils

from support.forking import fork_server
from support.loading import CPU
from support.quick_edits import edit_quickly
from support.ready import Ready, make_ready
from support.sharing import Share, made_once
from support.thorough import few
from support.tiny_models import SAMPLE_EDITS, TINY_CONFIGS, TYPICAL, VARIANTS, Chain, Outcome, Wise
from wisecli import cli
from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.edit.edit import edit
from wisecli.commands.measure.fetch import fetch
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings
from wisecli.evaluation.edited_model import EditedModel, attach

# Tiny models only lose by more threads, and figures must not depend on how many there are.
torch.set_num_threads(1)

Value = TypeVar("Value")


@pytest.fixture(scope="session")
def sweep(pytestconfig: pytest.Config) -> Callable[[Value, Value], Value]:
    """The small of two sizes, under --thorough the full one."""
    return lambda small, full: full if pytestconfig.getoption("--thorough") else small


@pytest.fixture(params=few(sorted(TINY_CONFIGS), (*TYPICAL, "llava")))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every supported architecture in turn; without --thorough one of each trait."""
    return str(request.param)


@pytest.fixture(params=few([*sorted(TINY_CONFIGS), *sorted(VARIANTS)], [*TYPICAL, "llama, tied", "falcon, parallel"]))
def variant(request: pytest.FixtureRequest) -> str:
    """Every supported architecture in each of its forms."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code of exported checkpoints goes to one directory for all tests: Python imports it from the first it sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command line; its exit code."""
    edit_quickly(monkeypatch)

    def call(*line: str) -> int:
        monkeypatch.setattr(sys, "argv", ["wise", *map(str, line)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


@pytest.fixture
def wise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Wise:
    """Runs the command line in an empty directory of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    edit_quickly(monkeypatch)
    monkeypatch.setenv("WISE_PASSES", "2")
    monkeypatch.setenv("WISE_FORMS", "bare,polite")
    monkeypatch.setenv("WISE_KINDS", "capitals,translate")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["wise", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(stopped.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once into the user cache."""
    return fetch("smollm2-135m")


@pytest.fixture(scope="session")
def real_tokenizer(real_model: Path) -> PreTrainedTokenizerBase:
    """SmolLM2-135M-Instruct's."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(real_model)
    return loaded


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Share:
    """Makes a directory that all processes that test share; none may change what is in it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    return partial(made_once, root)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a `wise` that starts at once; for a ``Forked``, too."""
    with fork_server(tmp_path_factory.mktemp("forks")) as directory:
        yield directory


@pytest.fixture(scope="session")
def ready(share: Share) -> Ready:
    """Things to run commands on; nothing in there may change."""
    return Ready(share("ready", make_ready))


@pytest.fixture(scope="session")
def chain(real_model: Path, share: Share) -> Chain:
    """Edit, merge and export the sample edits on the real model, once for all processes that test."""

    def make(root: Path) -> None:
        edit(str(real_model), SAMPLE_EDITS, root / "shards", EditSettings(unrelated_texts=150))
        merge([root / "shards"], root / "memory", MergeSettings())
        export(root / "memory", root / "edited", weights=WeightFiles(link=False))

    root = share("chain", make)
    edits = [json.loads(line) for line in SAMPLE_EDITS.read_text().splitlines()]
    return Chain(real_model, root / "shards", root / "memory", root / "edited", edits)


@pytest.fixture(scope="session")
def edited_chain(chain: Chain) -> EditedModel:
    """The real model with the chain's memory; whoever changes anything of it changes it back."""
    return attach(chain.memory, load=CPU)


@pytest.fixture(scope="session")
def real_stock(real_model: Path, share: Share) -> Path:
    """The sample edits in the real model as a stock checkpoint, with all the text that a gate reads by default."""

    def make(root: Path) -> None:
        edit(str(real_model), SAMPLE_EDITS, root / "shards", EditSettings())
        merge([root / "shards"], root / "memory", MergeSettings())
        export(root / "memory", root / "stock", "stock")

    return share("real stock", make) / "stock"
