"""The README and the docs: links lead somewhere, files and functions that they name are there."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_README = 100

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# What follows another folder's name is not a path of this repository.
FILE = re.compile(r"(?<![\w/.-])(?:wisecli|scripts|benchmarks|tests|sample_edits)/[\w./-]*[\w/]")
CALL = re.compile(r"`(?:(\w+)\.)?(\w+)\(\)`")


def identify(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text_of(page)), re.MULTILINE)
    found: list[str] = []
    for heading in headings:
        plain = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", one) is not None for one in found)
        found.append(f"{name}-{again}" if again else name)
    return frozenset(found)


def links_in(page: Path) -> Iterator[str]:
    for link in LINK.findall(CODE.sub("", FENCE.sub("", text_of(page)))):
        if not re.match(r"[a-z]+:", link):
            yield link


def broken(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return True
    return bool(anchor) and anchor not in anchors_of(target)


@cache
def defined() -> frozenset[str]:
    """Every function, class and method of the package, methods also with their class."""
    found: set[str] = set()
    for path in (ROOT / "wisecli").rglob("*.py"):
        owner = ""
        for indent, kind, name in re.findall(r"^( *)(?:async )?(def|class) (\w+)", text_of(path), re.MULTILINE):
            found.add(name)
            if kind == "class" and not indent:
                owner = name
            elif indent:
                found.add(f"{owner}.{name}")
    return frozenset(found)


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= LONGEST_README


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_in(ROOT / "README.md")}
    assert [identify(page) for page in PAGES if page not in linked and page.name != "README.md"] == []


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links_in(page) if broken(page, link)] == []


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_files_are_there(page: Path) -> None:
    named = {name for name in FILE.findall(LINK.sub("", text_of(page))) if "NAME" not in name}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_functions_are_there(page: Path) -> None:
    called = {".".join(filter(None, parts)) for parts in CALL.findall(FENCE.sub("", text_of(page)))}
    assert sorted(called - defined()) == []


def test_every_benchmark_that_can_be_run_is_in_the_table_of_scripts() -> None:
    table = text_of(ROOT / "docs" / "bench.md").partition("## Benchmark scripts")[2]
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert scripts
    assert [path.name for path in scripts if f"`benchmarks/{path.name}`" not in table] == []


def test_the_workflow_to_copy_pins_its_actions_and_leaves_no_credentials() -> None:
    """Audits of workflows: a tag of an action may be moved, and a checkout leaves a token where later steps find it."""
    (workflow,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.DOTALL)
    uses = re.findall(r"uses: (\S+) # v\d", workflow)
    assert len(uses) == workflow.count("uses:")
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one) for one in uses)
    assert workflow.count("persist-credentials: false") == sum("/checkout@" in one for one in uses)
    assert "contents: read" in workflow
