"""What keeps the package readable: modules of a page or two, functions that take few things."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "wisecli"
MODULES = sorted(ROOT.rglob("*.py"))
# A command's parameters are its options.
OF_COMMANDS = ROOT / "cli"
LINES, PARAMETERS, BODY = 300, 12, 40


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", [path for path in MODULES if OF_COMMANDS not in path.parents], ids=name_of)
def test_no_function_takes_too_much(path: Path) -> None:
    counts = {one.name: len(parameters(one)) for one in functions(path.read_text(encoding="utf-8"))}
    assert {name: count for name, count in counts.items() if count > PARAMETERS} == {}


@pytest.mark.parametrize("path", sorted(OF_COMMANDS.rglob("*.py")), ids=name_of)
def test_what_a_command_does_apart_from_its_signature_is_short(path: Path) -> None:
    found = functions(path.read_text(encoding="utf-8"))
    lengths = {one.name: (one.end_lineno or 0) - one.body[0].lineno + 1 for one in found}
    assert {name: length for name, length in lengths.items() if length > BODY} == {}


def test_parameters_of_every_kind_count() -> None:
    (function,) = functions("def f(self, a, /, b, c=1, *rest, d, e=2, **named): ...")
    assert parameters(function) == ["a", "b", "c", "d", "e"]
