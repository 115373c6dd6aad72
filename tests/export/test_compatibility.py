import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.every_type import model_types, unlike_decoders
from support.tiny_models import TINY_CONFIGS

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import compatibility

from wisecli.models.layout.architectures import architectures

# A plain decoder with turned matrices; recurrent states, alone and beside attention; convolutions; a text model inside
# another.
FEW = ["gpt2", "mamba2", "recurrent_gemma", "jamba", "lfm2", "gemma3"]
# A mixture; recurrent states beside attention in all layers; keys and values that upper layers share with lower ones.
ELSEWHERE = ["qwen3_moe", "falcon_h1", "gemma3n_text"]  # in test_behind_layers.py


@pytest.fixture(scope="module")
def results(sweep: Callable[..., Callable[[], list[str]]]) -> dict[str, dict[str, str]]:
    # To know which of all types are tried, every one of them has to be drawn.
    chosen = sweep(lambda: FEW, lambda: compatibility.tried(unlike_decoders()))
    return compatibility.table(chosen())


def section(heading: str) -> str:
    return compatibility.PAGE.read_text().partition(f"{heading}\n")[2].partition("\n#")[0]


def passing() -> set[str]:
    """The types that the page says pass every check."""
    names = section("## Edited").strip().partition("\n\n")[0]
    return {name.strip() for name in names.replace("\n", " ").split(";")}


def listed(heading: str) -> set[str]:
    """The types in the page's table below a heading."""
    cells = [line.split("|")[1] for line in section(heading).splitlines() if line.startswith("|")]
    return {name.strip() for cell in cells for name in cell.split(",")} - {"type", "types", "---"}


def test_the_page_lists_every_type() -> None:
    passed, others, left = passing(), listed("## Refused, or not right"), listed("## Not tried")
    assert set(architectures()) | set(TINY_CONFIGS) | {*FEW, *ELSEWHERE} <= passed
    assert set(model_types()) <= passed | others | left
    assert not passed & others


def test_every_type_that_the_page_says_passes_does_so_with_transformers_alone(
    results: dict[str, dict[str, str]],
) -> None:
    wrong = {name: one for name, one in results.items() if name in passing()}
    assert {name: one for name, one in wrong.items() if not compatibility.passed(one)} == {}
    assert results.keys() >= set(FEW)


@pytest.mark.thorough
def test_the_page_says_what_was_found(results: dict[str, dict[str, str]]) -> None:
    assert compatibility.PAGE.read_text() == compatibility.page(results, unlike_decoders())
