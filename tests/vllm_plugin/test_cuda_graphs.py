"""What vLLM is told of an edited model for CUDA graphs, which need a GPU, with vLLM's own settings and classes."""

import json
from typing import Any

import pytest
from support.served import in_engine, serving

from wisecli.vllm_plugin.engine_names import OP

pytestmark = serving


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(in_engine("cuda_graphs.py"))
    return found


@pytest.mark.parametrize("partition", ["False", "True"])
def test_graphs_are_cut_where_vllm_cuts_them_and_where_residuals_are_added(
    told: dict[str, Any], partition: str
) -> None:
    without, edited = told["cuts"][partition]
    assert edited
    assert sorted(edited) == sorted([*without, OP])


def test_residuals_end_a_graph_that_is_recorded_while_it_runs(told: dict[str, Any]) -> None:
    assert told["breaks"] == [1, [[3, 4]]]


def test_what_goes_into_the_edited_layer_is_never_of_eight_bits(told: dict[str, Any]) -> None:
    assert told["eight bits"] == ["eight bits", None]
