from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import TINY_CONFIGS, VARIANTS

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import compatibility

from wisecli.models.architectures import architectures

# A plain decoder, one whose matrices are transposed, and one that sees.
FEW = ["gpt2", "llama", "llava"]


@pytest.fixture(scope="module")
def results(sweep: Callable[[list[str], list[str]], list[str]]) -> dict[str, dict[str, str]]:
    return compatibility.table(sweep(FEW, [*sorted(TINY_CONFIGS), *sorted(VARIANTS)]))


def test_the_page_lists_every_row_of_the_table() -> None:
    lines = compatibility.PAGE.read_text().splitlines()
    listed = {line.split("|")[1].strip() for line in lines if line.startswith("|")}
    assert set(architectures()) <= listed


def test_every_architecture_passes_every_check_with_transformers_alone(results: dict[str, dict[str, str]]) -> None:
    failed = {name: one for name, one in results.items() if set(one.values()) != {compatibility.DONE}}
    assert failed == {}
    assert all(one.keys() == set(compatibility.CHECKS) for one in results.values())


@pytest.mark.thorough
def test_the_page_says_what_was_found(results: dict[str, dict[str, str]]) -> None:
    assert compatibility.PAGE.read_text() == compatibility.page(results)
