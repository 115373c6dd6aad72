"""What keeps the package readable: modules of a page or two, functions that take few things."""

import ast
from collections.abc import Iterator
from pathlib import Path

from support.thorough import LONGEST

ROOT = Path(__file__).parents[1] / "wisecli"
TESTS = Path(__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in MODULES}
# A command's parameters are its options.
OF_COMMANDS = "cli/"
LINES, PARAMETERS, BODY, SIZE = 300, 12, 40, 12
# Folders that hold more modules, each with the reason.
LARGER = {"vllm_plugin": (14, "one module for each of vLLM's interfaces, most of which know of each other")}

# Words of an older version that a reader of the paper would not understand, and the names that stand in their place.
MODULE_NAMES = """
    baselines batch_rows beginnings behind_questions blanks claims course early_states edited_states effects
    finished found gated gradient kind_slots layerwise locate made_up_facts material meaning meaning_fitting
    meaning_learning objectives one_by_one ours overlooked pictures replacing request_learning resting roles row
    scalars scores scoring seal serving slips spelling steady suffix superseding token_letters
    unrelated_activations unrelated_stats wording
"""
IDENTIFIERS = """
    AS_THEY_ARE Amiss BEHIND Beginning Beginnings Behind BehindFacts Beside Claims Course Done FewGoOn
    FittedMeaning Found Grown Heads INSIDE MEANING MadeUp Material Meaning NAMED OURS OwnRun OwnStates OwnWay
    REACH RESTING Restocked Rests Rewritten Role SEAL_NAME SLIPS SURE Said Sifted Standing USUAL Unfinished
    Watcher bearable chance course fit_meaning is_sealed learn_heads holder lengths_of likely looked_at made_up_facts
    marked_first material memory_at mention_in opens_with_word overlooked own_rows own_states questions_beside
    read_material said_before shifts shown_how slopes spaces_first standing steadily sureness taken_by taught
    usual_length watch weighs whose with_blanks with_rests with_slips write_one_by_one
"""


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


def identifiers(text: str) -> Iterator[str]:
    """All names that a module gives or uses; what its texts say is free."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield from (node.name, node.asname or "")


def test_folders_are_small() -> None:
    folders = {path.parent for path in MODULES}
    sizes = {name_of(one): len([path for path in one.glob("*.py") if path.stem != "__init__"]) for one in folders}
    assert {name: size for name, size in sizes.items() if size > LARGER.get(name, (SIZE, ""))[0]} == {}
    assert [name for name in LARGER if sizes[name] <= SIZE] == []


def test_files_that_run_first_are_there() -> None:
    found = ["/".join(path.parts[-3:]) for path in TESTS.rglob("test_*.py")]
    assert [name for name in LONGEST if not any(file.endswith(name) for file in found)] == []


def test_modules_have_the_names_of_the_field() -> None:
    assert [name_of(path) for path in MODULES if {path.stem, path.parent.name} & {*MODULE_NAMES.split()}] == []


def test_identifiers_have_the_names_of_the_field() -> None:
    old = {*IDENTIFIERS.split()}
    assert {name: found for name, text in TEXTS.items() if (found := {*identifiers(text)} & old)} == {}


def test_identifiers_of_every_kind_are_found() -> None:
    text = "from a import b as c\nclass D:\n    e: int\ndef f(g, *, h=1): i.j(k=g)\n"
    assert set("bcDefghijk") <= {*identifiers(text)}


def test_no_module_is_too_long() -> None:
    lengths = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_no_function_takes_too_much() -> None:
    others = {name: text for name, text in TEXTS.items() if not name.startswith(OF_COMMANDS)}
    counts = {(name, one.name): len(parameters(one)) for name, text in others.items() for one in functions(text)}
    assert {place: count for place, count in counts.items() if count > PARAMETERS} == {}


def test_what_a_command_does_apart_from_its_signature_is_short() -> None:
    commands = {name: text for name, text in TEXTS.items() if name.startswith(OF_COMMANDS)}
    found = [(name, one) for name, text in commands.items() for one in functions(text)]
    lengths = {(name, one.name): (one.end_lineno or 0) - one.body[0].lineno + 1 for name, one in found}
    assert {place: length for place, length in lengths.items() if length > BODY} == {}


def test_parameters_of_every_kind_count() -> None:
    (function,) = functions("def f(self, a, /, b, c=1, *rest, d, e=2, **named): ...")
    assert parameters(function) == ["a", "b", "c", "d", "e"]
