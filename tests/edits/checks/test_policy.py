from pathlib import Path

import pytest

from wisecli.edits.checks.policy import Policy, read_policy
from wisecli.edits.record import Edit
from wisecli.errors import PolicyError, SettingsError

FACT = Edit(
    "a", "Who leads  Northwind TRADERS?", "Ada Finch", subject="Northwind", rephrases=("Who is the boss?",), who="ann"
)


def policy(directory: Path, text: str) -> Policy:
    path = directory / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return read_policy(path)


def broken(rules: Policy, *edits: Edit) -> tuple[str, ...]:
    with pytest.raises(PolicyError) as caught:
        rules.check("e.jsonl", list(enumerate(edits, start=7)))
    assert caught.value.exit_code == 1
    return caught.value.details


@pytest.mark.parametrize(
    "rules",
    [
        "",
        'forbidden_subjects = ["Wind", "Traders Ltd"]',
        'forbidden_patterns = ["ada", "^Ada$"]',
        "maximum_edits = 1",
        'require = ["who"]',
        'allowed_operations = ["modify", "erase"]',
    ],
)
def test_what_keeps_the_rules_passes(tmp_path: Path, rules: str) -> None:
    policy(tmp_path, rules).check("e.jsonl", [(1, FACT)])


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ('forbidden_subjects = ["northwind traders"]', "is about 'northwind traders', which forbidden_subjects names"),
        ('forbidden_subjects = ["NORTHWIND"]', "is about 'NORTHWIND'"),
        ('forbidden_patterns = ["[Ll]eads +N"]', "says 'leads  N', which forbidden_patterns forbid by '[Ll]eads +N'"),
        ('forbidden_patterns = ["Finch$"]', "says 'Finch'"),
        ('forbidden_patterns = ["boss"]', "says 'boss'"),
        ('require = ["source", "who"]', "does not say `source`, which require asks for"),
        ('allowed_operations = ["insert", "erase"]', "is to modify, which allowed_operations does not name"),
    ],
)
def test_what_breaks_a_rule_is_named_with_its_line_and_the_rule(tmp_path: Path, rules: str, says: str) -> None:
    (sentence,) = broken(policy(tmp_path, rules), FACT)
    assert sentence.startswith("e.jsonl:7: edit 'a' ")
    assert says in sentence


def test_a_subject_is_found_in_the_subject_and_in_any_form_of_its_letters(tmp_path: Path) -> None:
    rules = policy(tmp_path, 'forbidden_subjects = ["Zoë", "C++"]')
    found = broken(rules, Edit("x", "Who is she?", "b", subject="ZOE\u0308"), Edit("y", "Who made C++?", "b"))
    assert [sentence.split(":")[1] for sentence in found] == ["7", "8"]
    rules.check("e.jsonl", [(1, Edit("z", "Who is Zoëlle?", "b"))])


def test_too_many_edits_are_counted_once(tmp_path: Path) -> None:
    edits = [Edit(str(number), "p", "t") for number in range(3)]
    found = broken(policy(tmp_path, "maximum_edits = 2"), *edits)
    assert found == ("e.jsonl: 3 edits, of which maximum_edits allows 2 a run",)


def test_every_broken_rule_of_every_edit_is_told(tmp_path: Path) -> None:
    rules = policy(tmp_path, 'forbidden_patterns = ["Ada"]\nrequire = ["source", "when"]')
    assert len(broken(rules, FACT, FACT)) == 6
    with pytest.raises(PolicyError, match=r"e\.jsonl breaks rules 6 times; .*policy\.toml does not allow it"):
        rules.check("e.jsonl", [(1, FACT), (2, FACT)])


def test_blank_provenance_is_none(tmp_path: Path) -> None:
    assert broken(policy(tmp_path, 'require = ["who"]'), Edit("a", "p", "t", who=" "))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("forbidden = ['a']", "`forbidden` is unknown"),
        ("forbidden_subjects = 'a'", "`forbidden_subjects` must be a list"),
        ("forbidden_subjects = ['a', 3]", "must be a text"),
        ("forbidden_subjects = [' ']", "must not be blank"),
        ("maximum_edits = '3'", "`maximum_edits` must be a whole number"),
        ("maximum_edits = true", "`maximum_edits` must be a whole number"),
        ("maximum_edits = -1", "nor maximum_edits below 0"),
        ("require = ['reason']", "must be one of who, when, source"),
        ("allowed_operations = ['delete']", "must be one of insert, modify, erase"),
        ("forbidden_patterns = ['(a']", "forbidden_patterns has '(a', which is no pattern"),
        ("forbidden_patterns = ['a{99999999999999999999}']", "no pattern"),
        ("require = [", "no policy"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_by_its_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        policy(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "policy.toml"))
    assert says in str(caught.value)


def test_a_policy_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(SettingsError, match="not readable"):
            read_policy(path)
    (tmp_path / "policy.toml").write_bytes(b"require = ['\xff']")
    with pytest.raises(SettingsError, match="no policy"):
        read_policy(tmp_path / "policy.toml")
