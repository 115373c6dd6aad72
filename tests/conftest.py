"""Models to test on, tiny ones of every architecture and a real one with its chain of outputs; the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support.tiny_models import (
    SAMPLE_EDITS,
    TINY_CONFIGS,
    VARIANTS,
    Chain,
    Outcome,
    Wise,
)
from transformers import (
    dynamic_module_utils,
)

from wisecli import cli
from wisecli.commands.edit import RunOptions, edit
from wisecli.commands.export import WeightFiles, export
from wisecli.commands.fetch import fetch
from wisecli.commands.merge import merge
from wisecli.config import EditSettings, MergeSettings

# Tiny models only lose by more threads, and figures must not depend on how many there are.
torch.set_num_threads(1)


@pytest.fixture(params=sorted(TINY_CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Every supported architecture in turn."""
    return str(request.param)


@pytest.fixture(params=[*sorted(TINY_CONFIGS), *sorted(VARIANTS)])
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
    monkeypatch.setenv("WISE_UNRELATED_TEXTS", "16")

    def call(*line: str) -> int:
        monkeypatch.setattr(sys, "argv", ["wise", *line])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


@pytest.fixture
def wise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Wise:
    """Runs the command line in an empty directory of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("WISE_UNRELATED_TEXTS", "16")
    monkeypatch.setenv("WISE_PASSES", "2")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["wise", *arguments])
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
def chain(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Edit, merge and export the sample edits on the real model, once for all processes that test."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    shards, memory, exported = (root / "chain" / part for part in ("shards", "memory", "edited"))
    with FileLock(root / "chain.lock"):
        if not exported.exists():
            edit(str(real_model), SAMPLE_EDITS, shards, EditSettings(), options=RunOptions(force=True))
            merge([shards], memory, MergeSettings(), force=True)
            export(memory, exported, weights=WeightFiles(link=False))
    edits = [json.loads(line) for line in SAMPLE_EDITS.read_text().splitlines()]
    return Chain(real_model, shards, memory, exported, edits)
