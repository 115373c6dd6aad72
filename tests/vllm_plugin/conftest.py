"""vLLM with the plugin, by each of its model runners."""

from collections.abc import Iterator

import pytest
from support.served import VLLM, Runner


@pytest.fixture(scope="module", params=["first", "second"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Which of vLLM's model runners runs a model."""
    which: Runner = request.param
    return which


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory, runner: Runner) -> Iterator[VLLM]:
    """A process that serves one checkpoint after another."""
    engine = VLLM(tmp_path_factory.mktemp("engine"), plugin=True, runner=runner)
    yield engine
    engine.stop()
