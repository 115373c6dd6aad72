"""Which way imports point: each package only to those below it, no module in a circle, `routing` to no other."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "wisecli"
# From the bottom up; packages of one floor know nothing of each other. See docs/architecture.md.
FLOORS = (
    ("errors", "progress", "environment", "data", "routing"),
    ("validated_settings", "retired_settings", "registry"),
    ("config",),
    ("io",),
    ("models", "edits"),
    ("artifacts", "drafting"),
    ("editing", "evaluation", "export", "vllm_plugin"),
    ("memory",),
    ("commands",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
MODULES = {
    ".".join(("wisecli", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


@cache
def imported(module: str) -> frozenset[str]:
    """Every module that one imports, wherever in its text, for types only or not."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[str]:
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = (f"{source}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else source for name in names)


def own(module: str) -> set[str]:
    """The modules of this package that one imports."""
    return {name for name in imported(module) if name in MODULES} - {"wisecli"}


def package_of(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_a_floor() -> None:
    assert {package_of(module) for module in MODULES if module != "wisecli"} == FLOOR.keys()


def test_imports_point_down() -> None:
    for module in sorted(MODULES.keys() - {"wisecli"}):
        package = package_of(module)
        targets = {name for name in own(module) if package_of(name) != package}
        assert [name for name in sorted(targets) if FLOOR[package_of(name)] >= FLOOR[package]] == [], module


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter({module: own(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_package_itself_only_exposes_load() -> None:
    assert own("wisecli") == {"wisecli.config", "wisecli.evaluation.edited_model"}


def test_routing_needs_what_loads_a_checkpoint_alone() -> None:
    for module in (name for name in MODULES if name.startswith("wisecli.routing")):
        foreign = {name.split(".")[0] for name in imported(module)} - sys.stdlib_module_names - {"wisecli"}
        assert foreign <= {"torch", "transformers"}, module
        assert all(package_of(name) == "routing" for name in own(module)), module
