"""What vLLM does with an edited model on a GPU alone, as far as its settings and classes say it without one."""

import json
from typing import Any

import pytest
from support.served import in_engine, serving

from wisecli.vllm_plugin.engine_names import OP

pytestmark = serving


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(in_engine("on_a_gpu.py"))
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


def test_windows_are_read_with_whole_queries_also_before_a_cache_of_eight_bits(told: dict[str, Any]) -> None:
    assert told["queries"] == [True, False, True]


def test_windows_attend_to_the_same_if_little_of_it_may_be_in_memory(told: dict[str, Any]) -> None:
    assert told["off"] < 1e-6
