"""What follows from an edit by rule: its prompt with another name of its subject, and its relation asked back.

No rule may give what is false in general. So names are not shortened to what others are called as well, and a relation
is asked back only if ``inverses.toml`` has it, where one name answers it. Where two edits would give one question two
answers, it gets none.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

from wisecli.data.corpus import Inverse, inverses
from wisecli.edits.reading.record_fields import LONGEST_ID
from wisecli.edits.record import Edit, Numbered, consequence_id
from wisecli.edits.text import folded, words

_SLOT = "{}"
# Forms of one word, and words that make no difference to what is asked.
_SAME = {**dict.fromkeys(("was", "were", "are"), "is"), **dict.fromkeys(("does", "do"), "did"), "whom": "who"}
_IDLE = ("the", "a", "an")
_LEGAL_FORMS = r"(?:Inc|Ltd|LLC|PLC|plc|Corp|Co|GmbH|AG|SE|S\.A|N\.V|B\.V|S\.p\.A|Limited|Incorporated)\.?"
_TITLES = r"(?:Sir|Dame|Dr|Prof|Professor)"
_ACRONYM = re.compile(r"(?P<name>.+\S)\s+\((?P<letters>[A-Z][A-Z0-9]{1,9})\)")
# An answer of more words is a description; these are none.
_LONGEST_NAME = 8
_NO_NAMES = ("yes", "no", "none", "unknown", "nobody", "n/a", "various")


def with_derived(numbered: Sequence[Numbered]) -> tuple[Numbered, ...]:
    """Return edits with what follows from them by rule; each is followed by its consequences, the stated ones first."""
    given = {_normal(edit.prompt) for _, edit in numbered}
    found: dict[str, list[Edit]] = {}
    for _, edit in numbered:
        for consequence in derived(edit):
            found.setdefault(_normal(consequence.prompt), []).append(consequence)
    sure = [same[0] for asked, same in found.items() if asked not in given and len({edit.target for edit in same}) == 1]
    own: dict[str | None, list[Edit]] = {}
    for consequence in sure:
        own.setdefault(consequence.consequence_of, []).append(consequence)
    last = {edit.consequence_of or edit.id: index for index, (_, edit) in enumerate(numbered)}
    whole: list[Numbered] = []
    for index, (line, edit) in enumerate(numbered):
        whole.append((line, edit))
        name = edit.consequence_of or edit.id
        if last[name] == index:
            whole += ((line, consequence) for consequence in own.get(name, ()))
    return tuple(whole)


def derived(edit: Edit) -> tuple[Edit, ...]:
    """Return what follows from an edit by rule; nothing if it erases a fact or is a consequence itself."""
    subject = edit.subject or ""
    if edit.erased or edit.consequence_of is not None or len(_places(subject, edit.prompt)) != 1:
        return ()
    found = [*_renamed(edit, subject), *_reversed(edit, subject)]
    return tuple(consequence for consequence in found if len(consequence.id) <= LONGEST_ID)


def _renamed(edit: Edit, subject: str) -> Iterator[Edit]:
    start, end = _places(subject, edit.prompt)[0]
    for number, (rule, name) in enumerate(other_names(subject), start=1):
        prompt = edit.prompt[:start] + name + edit.prompt[end:]
        yield _consequence(edit, consequence_id(edit.id, "alias", number), prompt, edit.answer, name, rule)


def _reversed(edit: Edit, subject: str) -> Iterator[Edit]:
    """Yield the inverse of a fact, with subject and answer exchanged, where the relation has one."""
    known = _inverses().get(_asked(edit.prompt, subject))
    answer = edit.answer.strip()
    if known is None or not is_name(answer) or folded(answer) == folded(subject):
        return
    past = re.search(r"\b(?:was|were)\b", edit.prompt) is not None
    back = known.asked if edit.prompt.rstrip().endswith("?") else known.told
    prompt = back.replace("{be}", "was" if past else "is").replace(_SLOT, answer)
    yield _consequence(edit, consequence_id(edit.id, "reverse", 1), prompt, subject, answer, f"reverse of {known.name}")


def _consequence(edit: Edit, name: str, prompt: str, target: str, subject: str, rule: str) -> Edit:
    """Return a derived edit, with the author, time and source of the edit it follows from."""
    return Edit(
        id=name,
        prompt=prompt,
        target=target,
        subject=subject,
        who=edit.who,
        when=edit.when,
        source=edit.source,
        consequence_of=edit.id,
        derived=rule,
    )


def other_names(subject: str) -> list[tuple[str, str]]:
    """Return names that mean the same subject and nothing else, each with the rule that finds it."""
    found: dict[str, str] = {}
    if (acronym := _ACRONYM.fullmatch(subject)) is not None and _spells(acronym["letters"], acronym["name"]):
        found[acronym["name"]] = found[acronym["letters"]] = "acronym"
    if (company := re.fullmatch(rf"(.*[^\W_]),?\s+{_LEGAL_FORMS}", subject)) is not None:
        found[company[1]] = "legal form"
    if (person := re.fullmatch(rf"{_TITLES}\.?\s+(\S+\s+\S.*)", subject)) is not None:
        found[person[1]] = "title"
    plain = _without_marks(subject)
    if plain != subject and plain.isascii():
        found[plain] = "plain letters"
    return [(rule, name) for name, rule in found.items() if name != subject]


def _spells(letters: str, name: str) -> bool:
    """Return whether letters are the first ones of a name's words, small words counted or not."""
    parts = [part for part in re.split(r"[\s-]+", name) if part]
    return letters in {"".join(part[0].upper() for part in parts), "".join(p[0] for p in parts if p[0].isupper())}


def _without_marks(text: str) -> str:
    split = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in split if not unicodedata.combining(letter))


def is_name(answer: str) -> bool:
    """Return whether an answer is the name of one thing, which something else can be asked about."""
    plain = folded(answer)
    # Of Greece and Denmark there may be one princess.
    listed = re.search(r"[,;/\n]|\bor\b", plain) or re.search(r"\band\b", plain.partition(" of ")[0])
    short = 0 < len(words(answer)) <= _LONGEST_NAME
    named = short and not answer[0].islower() and not answer[0].isdigit() and answer[-1] not in ".!?"
    return named and listed is None and plain not in _NO_NAMES


@cache
def _inverses() -> dict[str, Inverse]:
    """Return the inverse relation of every wording that asks for one."""
    return {_normal(wording): inverse for inverse in inverses() for wording in inverse.wordings}


def _asked(prompt: str, subject: str) -> str:
    start, end = _places(subject, prompt)[0]
    return _normal(prompt[:start] + _SLOT + prompt[end:])


def _normal(wording: str) -> str:
    """Return a wording in which possessives, articles, tenses and punctuation make no difference."""
    text = folded(wording).replace("’", "'").replace(_SLOT, " _ ")
    text = re.sub(r"\b(who|what)'s\b", r"\1 is", text)
    text = re.sub(r"'s\b|'(?=\s)", " ", text)
    return " ".join(_SAME.get(word, word) for word in words(text) if word not in _IDLE)


def _places(subject: str, prompt: str) -> list[tuple[int, int]]:
    """Return where a subject stands in a prompt as whole words."""
    if not subject.strip():
        return []
    return [found.span() for found in re.finditer(rf"(?<!\w){re.escape(subject.strip())}(?!\w)", prompt, re.I)]
