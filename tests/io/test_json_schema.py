import json
import math
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wisecli.artifacts import shard_manifest
from wisecli.artifacts.memory_manifest import MemoryManifest
from wisecli.editing.run.staging import FinishedPart
from wisecli.edits.checks import policy
from wisecli.edits.record import Edit
from wisecli.io.json_schema import CLOSED, OPEN, decode, parse, shown
from wisecli.memory.history.release_log import Release


@dataclass(frozen=True)
class Leaf:
    __pydantic_config__ = CLOSED
    name: str
    share: float = 0.5


@dataclass(frozen=True)
class Tree:
    __pydantic_config__ = CLOSED
    kind: Literal["oak", "elm"]
    count: int
    tall: bool
    leaves: tuple[Leaf, ...]
    pair: tuple[float, float] | None
    mixed: tuple[str | int, ...]
    sizes: dict[str, int]
    rest: dict[str, Any]


@dataclass(frozen=True)
class Open:
    __pydantic_config__ = OPEN
    name: str


GOOD: dict[str, Any] = {
    "kind": "oak",
    "count": 3,
    "tall": True,
    "leaves": [{"name": "a"}, {"name": "b", "share": 1}],
    "pair": [0.5, 2],
    "mixed": ["float32", 4],
    "sizes": {"a": 1},
    "rest": {"any": [None, {"thing": 1}]},
}


def test_every_type_is_decoded() -> None:
    tree = decode(Tree, GOOD)
    assert tree.leaves == (Leaf("a", 0.5), Leaf("b", 1.0))
    assert isinstance(tree.leaves[1].share, float)
    assert (tree.pair, tree.mixed, tree.sizes) == ((0.5, 2.0), ("float32", 4), {"a": 1})
    assert decode(Tree, {**GOOD, "pair": None}).pair is None
    assert decode(Tree, json.loads(json.dumps(asdict(tree)))) == tree
    assert decode(dict[str, str], {"a": "b"}) == {"a": "b"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "ash"}, "`kind` must be one of oak, elm, not 'ash'"),
        ({"kind": ["oak"]}, "`kind` must be one of oak, elm, not ['oak']"),
        ({"count": True}, "`count` must be a whole number, not True"),
        ({"count": 3.0}, "`count` must be a whole number"),
        ({"count": 2**53}, "`count` must be a whole number"),
        ({"count": -(2**53)}, "`count` must be a whole number"),
        ({"sizes": {"a": 1, "b": 2**53}}, "`sizes.b` must be a whole number"),
        ({"leaves": [{"name": "a", "share": 1e301}]}, "`leaves[0].share` must be a finite number"),
        ({"count": 2**53, "sizes": {"e+ NaN, Infinity": 1}}, "`count` must be a whole number"),
        ({"leaves": [{"name": "a", "share": -math.inf}]}, "`leaves[0].share` must be a finite number, not -inf"),
        ({"tall": 1}, "`tall` must be true or false"),
        ({"leaves": {}}, "`leaves` must be a list"),
        ({"leaves": [{"name": "a"}, 5]}, "`leaves[1]` must be an object, not 5"),
        ({"leaves": [{}]}, "`leaves[0].name` is missing"),
        ({"leaves": [{"name": "a", "colour": 1}]}, "`leaves[0].colour` is unknown"),
        ({"leaves": [{"name": "a", "share": math.nan}]}, "`leaves[0].share` must be a finite number, not nan"),
        ({"leaves": [{"name": "a", "share": 10**400}]}, "`leaves[0].share` must be a finite number"),
        ({"leaves": [{"name": "a", "share": "1"}]}, "`leaves[0].share` must be a finite number"),
        ({"pair": [1.0]}, "`pair` must be a list of 2"),
        ({"mixed": [[]]}, "`mixed[0]` must be a whole number"),
        ({"sizes": {"a": "b"}}, "`sizes.a` must be a whole number"),
        ({"rest": []}, "`rest` must be an object"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        decode(Tree, {**GOOD, **changes})
    assert says in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is missing"):
        decode(Tree, {field: value for field, value in GOOD.items() if field != name})


def test_only_an_open_record_passes_over_what_it_does_not_know() -> None:
    assert decode(Open, {"name": "a", "more": 1}) == Open("a")
    with pytest.raises(ValueError, match="`more` is unknown"):
        decode(Leaf, {"name": "a", "more": 1})


@pytest.mark.parametrize("text", ["[" * 10**5, "[" * 70 + "]" * 70, '{"a":' * 70 + "1" + "}" * 70])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(text)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', '[["\\ud83d"]]'])
def test_half_a_character_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="half a character"):
        parse(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")), st.lists))
def test_ordinary_json_is_read_as_ever(value: Any) -> None:
    assert parse(json.dumps(value)) == value


@given(st.text() | st.lists(st.text()) | st.integers())
def test_what_is_shown_is_short_and_on_one_line(value: Any) -> None:
    assert len(shown(value)) <= 260
    assert "\n" not in shown(value)
    assert len(shown("x" * 10**6)) < 100


def records_in(kind: Any) -> set[type]:
    """The dataclasses that a type is made of."""
    if is_dataclass(kind):
        assert isinstance(kind, type)
        inner = [records_in(hint) for name, hint in get_type_hints(kind).items() if name in kind.__dataclass_fields__]
        return {kind}.union(*inner)
    return set().union(*map(records_in, get_args(kind)))


@pytest.mark.parametrize(
    "kind", [Edit, policy._Content, shard_manifest._Content, MemoryManifest, Release, FinishedPart]
)
def test_every_record_says_whether_it_is_closed(kind: type) -> None:
    found = records_in(kind)
    assert kind in found
    for record in found:
        config = vars(record).get("__pydantic_config__")
        assert config in (CLOSED, OPEN), record
