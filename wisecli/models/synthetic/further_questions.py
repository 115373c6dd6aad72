"""Questions that are made of another one: whether a value is its answer, and what is asked of its answer."""

import random
import re
from collections.abc import Sequence

from wisecli.data.corpus import capital, relations, small
from wisecli.models.prompts.question_rewriting import noun_phrase

_AUXILIARY = "is|was|are|were|does|did|do|has|have|can|will|would"
_LINKED = "in|on|at|by|to|from|of|with|for|under|through|into"
_ASKED = re.compile(
    rf"(?P<word>Who|Whom|What|Where|When|How|Which|(?P<link>{_LINKED}) (?:which|what|whom))\b(?:.*?) ?"
    rf"\b(?P<aux>{_AUXILIARY}) (?P<rest>.+)\?",
    re.IGNORECASE,
)
_TOLD = re.compile(r"(?P<before>.+?) (?P<aux>is|was|are|were)(?P<after>(?: .+)?)")
# What stands before a place and before a time.
_BEFORE = {"where": ("in", "at", "in"), "when": ("in", "on")}
# Kinds of subjects that a person, a place or a thing may be.
_KINDS = {
    "person": ("person", "athlete", "musician"),
    "place": ("place", "country", "building", "river"),
    "thing": ("company", "film", "book", "organisation", "software", "series", "team", "event", "language"),
}


def yes_or_no(question: str, told: Sequence[str], value: str, rng: random.Random) -> str | None:
    """Return the question whether a value is what a question asks, as one would put it; None if no rule fits.

    Args:
        told: beginnings of statements that an answer completes.
    """
    found = [*_of_question(question, value, rng), *(one for text in told for one in _of_statement(text, value))]
    return rng.choice(found) if found else None


def _of_question(question: str, value: str, rng: random.Random) -> list[str]:
    """Of ``Where was X born?`` the question ``Was X born in V?``."""
    asked = _ASKED.fullmatch(question)
    if asked is None:
        found = re.fullmatch(r"Who (.+)\?", question)
        return [f"Was it {value} who {found[1]}?", f"Is {value} the one who {found[1]}?"] if found else []
    aux, rest = capital(asked["aux"].lower()), asked["rest"]
    if re.match(r"the |\S+'s ", rest) and aux in ("Is", "Was", "Are", "Were"):
        return [f"{aux} {rest} {value}?", f"{aux} {value} {rest}?"]
    link = asked["link"] or rng.choice(_BEFORE.get(asked["word"].lower(), ("",)))
    return [" ".join(f"{aux} {rest} {link.lower()} {value}?".split())]


def _of_statement(text: str, value: str) -> list[str]:
    """Of ``The mayor of X is`` the question ``Is the mayor of X V?``."""
    told = _TOLD.fullmatch(text)
    if told is None:
        return []
    before = small(told["before"]) if re.match(r"The |An? |In |By ", told["before"]) else told["before"]
    return [f"{capital(told['aux'])} {before}{told['after']} {value}?"]


def two_hops(wordings: Sequence[str], subject: str, rng: random.Random) -> str | None:
    """Return a question on the answer of another: ``Where was the mayor of X born?``; None if no rule fits.

    Args:
        wordings: questions, and beginnings of statements that their answer completes.
    """
    phrases = [noun_phrase(text, subject) for text in wordings]
    usable = [one for one in phrases if one is not None and one[1] in _KINDS]
    if not usable:
        return None
    phrase, sort = rng.choice(usable)
    known = [one for one in relations() if one.kind in _KINDS[sort]]
    return capital(rng.choice(rng.choice(known).asks).replace("{}", phrase))
