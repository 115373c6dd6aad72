"""Questions rewritten by rule: as noun phrases, negated, as keywords, with an adjective, with pronouns."""

import random
import re

_BE = r"is|was|are|were"
_AUXILIARY = rf"{_BE}|has|had|can|will|should|must"
_PREPOSITION = r"in|on|from|to|at|of|by|under|for|with|into|through"
_PLACE_WORDS = "city town village country state region continent county harbour island place river birthplace"
_PLACES = frozenset(_PLACE_WORDS.split())
_TIMES = frozenset({"year", "date", "day", "month", "century", "decade", "time"})
_PERSON = re.compile(
    r"\b(born|die[ds]?|death|married|spouse|wife|husband|citizen(ship)?|mother|father|sister|brother|child(ren)?|he|she"
    r"|profession|occupation|job|gender|sex|nationality|educated|alma mater|position)\b"
)
# Words without which a question is still understood as a search.
_SMALL_WORDS = """
    a an the is was are were be been do does did has have had can could will would should of in on at to by for from
    with into as and or who whom whose what which when where why how it its that this there s called name please
"""
_SMALL = frozenset(_SMALL_WORDS.split())
_PAST_FORMS = """
    come:came take:took write:wrote have:had make:made win:won begin:began become:became leave:left go:went get:got
    hold:held see:saw find:found build:built speak:spoke lead:led run:ran lose:lost pass:passed play:played grow:grew
    sing:sang serve:served study:studied marry:married set:set
"""
_PAST: dict[str, str] = dict(pair.split(":") for pair in _PAST_FORMS.split())
_ADVERBS = frozenset({"first", "also", "ever", "usually", "originally", "mostly"})


def without_mark(text: str) -> str:
    """Return a question without its mark."""
    return text.rstrip().rstrip("?").rstrip()


def lowered(text: str, subject: str | None) -> str:
    """Return a text whose first letter is small, unless a name begins there."""
    first = text.split(" ", maxsplit=1)[0]
    if (subject and text.startswith(subject)) or first.isupper() or any(letter.isdecimal() for letter in first):
        return text
    return text[:1].lower() + text[1:]


def noun_phrase(question: str, subject: str) -> tuple[str, str] | None:
    """Return the question as a noun phrase, and whether that is a ``person``, a ``place``, a ``time`` or a ``thing``.

    None where no rule fits.
    """
    text = without_mark(question).replace("What's ", "What is ").replace("Who's ", "Who is ")
    for rule in (_definition, _relative, _of_place_or_time, _by_verb):
        found = rule(text, subject)
        if found is not None:
            return found[0].strip(), found[1]
    return None


def _definition(text: str, subject: str) -> tuple[str, str] | None:
    """Return ``the mayor of X``, and its sort, for ``Who is the mayor of X`` or ``The mayor of X is``."""
    stated = re.fullmatch(rf"(The .+) (?:{_BE})", text)
    if stated:
        phrase = "the" + stated[1][3:]
        return phrase, _sort_of(phrase, "")
    match = re.fullmatch(rf"(Who|What|Which) (?:{_BE}) (the .+|{re.escape(subject)}'s .+)", text)
    if not match:
        return None
    phrase = re.sub(r"^the (?:full )?name of ", "", re.sub(r" (called|named)$", "", match[2]))
    return phrase, _sort_of(phrase, match[1])


def _relative(text: str, subject: str) -> tuple[str, str] | None:
    """Return ``the year in which X was founded``, and its sort, for ``In which year was X founded``."""
    head = rf"(?:({_PREPOSITION}) )?(?:which|what) ([\w -]+?)"
    match = re.fullmatch(rf"{head} ({_AUXILIARY}|does|do|did) {_name(subject)}(.*)", text, flags=re.IGNORECASE)
    if not match:
        passive = re.fullmatch(rf"(?:Which|What) ([\w -]+?) ((?:{_BE}) [a-z]+ .*{re.escape(subject)}.*)", text)
        return (f"the {passive[1]} that {passive[2]}", _sort_of(passive[1], "")) if passive else None
    before, noun, verb, name, rest = match.groups()
    link = f"{before.lower()} which" if before else "that"
    return f"the {noun} {link} {_as_statement(verb.lower(), name, rest)}", _sort_of(noun, "")


def _of_place_or_time(text: str, subject: str) -> tuple[str, str] | None:
    """Return ``the place where X was born``, and its sort, for ``Where was X born``."""
    match = re.fullmatch(rf"(Where|When) ({_AUXILIARY}|does|do|did) {_name(subject)}(.*)", text)
    if not match:
        return None
    sort, noun = ("place", "the place where") if match[1] == "Where" else ("time", "the time when")
    rest = match[4].strip()
    return f"{noun} {_as_statement(match[2], match[3], rest) if rest else f'{match[3]} {match[2]}'}", sort


def _name(subject: str) -> str:
    """Return a pattern for what a clause is about: the subject, or what has an article and ends with it."""
    return rf"((?:(?:the|a|an) .*?)?{re.escape(subject)}(?: \([^)]*\))?(?:'s [\w-]+)?)"


def _by_verb(text: str, subject: str) -> tuple[str, str] | None:
    """Return ``the person who wrote X``, and its sort, for ``Who wrote X``."""
    match = re.fullmatch(rf"(Who|What(?= \w+(?:s|ed) )) ([a-z]+) ((?:[a-z]+ ){{0,3}}{re.escape(subject)}.*)", text)
    if match and match[2] not in (*_AUXILIARY.split("|"), "do", "does", "did"):
        sort, noun = ("person", "the person who") if match[1] == "Who" else ("thing", "the thing that")
        return f"{noun} {match[2]} {match[3]}", sort
    match = re.fullmatch(rf"(?:Which|What) ([a-z -]+) ([a-z]+) ((?:the )?{re.escape(subject)}.*)", text)
    if match and not re.search(rf"\b({_AUXILIARY}|do|does|did|{_PREPOSITION})\b", f"{match[1]} {match[2]}"):
        return f"the {match[1]} that {match[2]} {match[3]}", _sort_of(match[1], "")
    return None


def _as_statement(verb: str, name: str, rest: str) -> str:
    """Return a clause in the order of a statement: its verb after the name."""
    words = rest.split()
    if not words and verb in _BE.split("|"):
        return f"{verb} {name}"
    if words and words[0] in _ADVERBS:
        words = [*words[1:2], words[0], *words[2:]]
    if verb in ("does", "do", "did") and words:
        first = words[0]
        if verb == "did":
            first = _PAST.get(first, first + ("d" if first.endswith("e") else "ed"))
        elif verb == "does":
            first = {"have": "has"}.get(first, first + ("es" if first.endswith(("s", "sh", "ch", "x", "o")) else "s"))
        return " ".join([name, first, *words[1:]])
    return " ".join([name, verb, *words])


def _sort_of(phrase: str, asked: str) -> str:
    """Return what a phrase names, by the noun before its first preposition."""
    words = re.split(rf" (?:{_PREPOSITION}|that|where) ", phrase.lower())[0].split()
    if asked == "Who":
        return "person"
    if set(words[-1:]) & _PLACES:
        return "place"
    return "time" if set(words[-1:]) & _TIMES else "thing"


def negated(question: str, subject: str) -> str | None:
    """Return the question with ``not`` after its first verb, or after the name where that comes next."""
    found = re.search(rf" ({_AUXILIARY}|does|do|did)\b", question)
    if not found:
        return None
    head, rest = question[: found.end()], question[found.end() :]
    name = re.match(rf" (?:I|you|we|one)\b| {_name(subject)}(?!\w)", rest)
    if not name:
        return f"{head} not{rest}"
    after = without_mark(rest[name.end() :]).strip()
    clause = not name[0].startswith(" the ") or bool(after) or question.startswith(("Where", "When"))
    if found[1] in _BE.split("|") and (not clause or re.match(rf"called|{_AUXILIARY}", after)):
        return f"{head} not{rest}"
    return f"{head}{name[0]} not{rest[name.end() :]}"


def with_adjective(question: str, adjective: str, subject: str | None) -> str | None:
    """Return the question with an adjective after the first ``the`` that does not belong to the subject."""
    for found in re.finditer(r"\b[Tt]he (?!same\b)", question):
        if not (subject and any(question.startswith(subject, start) for start in found.span())):
            return f"{question[: found.end()]}{adjective} {question[found.end() :]}"
    return None


def keywords(question: str, subject: str, where: str) -> str | None:
    """Return the words that say something, with the subject ``first``, ``last`` or where it is ``asked``."""
    if subject not in question:
        return None
    before, _, after = question.partition(subject)
    heads, tails = (
        [word for word in re.findall(r"[\w'.-]*\w", part) if word.lower().removesuffix("'s") not in _SMALL]
        for part in (before, after.removeprefix("'s"))
    )
    if not heads and not tails:
        return None
    if where == "first":
        return " ".join([subject, *heads, *tails])
    if where == "last":
        return " ".join([*heads, *tails, subject])
    return " ".join([*heads, subject, *tails])


def with_pronoun(question: str, subject: str, rng: random.Random, *, person: bool | None = None) -> str | None:
    """Return the question with a pronoun for its subject; for a ``person`` one of three, by chance.

    Args:
        person: by default taken from what the question is about.
    """
    name = rf"(?<![\w-]){re.escape(subject)}(?: \([^)]*\))?('s)?(?!\w)"
    # With "the gender X is known by" the noun stays: it is not the subject's.
    found = re.search(rf"(?:\b(?:the|a|an) (?:[\w-]+ (?!.*? (?:{_BE}) ))?)?{name}", question)
    found = re.match(rf"The (?:[\w-]+ )?{name}", question) or found
    if not found:
        return None
    if person is None:
        person = _PERSON.search(question.replace(subject, "").lower()) is not None
    pronoun = rng.choice(("he", "she", "they") if person else ("it",))
    before = re.search(rf"\b({_AUXILIARY}|does|do|did|that) $", question[: found.start()])
    if found[1]:
        pronoun = {"he": "his", "she": "her", "they": "their", "it": "its"}[pronoun]
    elif not before and found.start() and not re.match(rf" (?:{_AUXILIARY})\b", question[found.end() :]):
        pronoun = {"he": "him", "she": "her", "they": "them", "it": "it"}[pronoun]
    text = question[: found.start()] + pronoun + question[found.end() :]
    if pronoun == "they":
        text = re.sub(r"\b(is|was|does|has) they\b", lambda match: _PLURAL[match[1]] + " they", text)
        text = re.sub(r"^they (is|was|does|has)\b", lambda match: "they " + _PLURAL[match[1]], text)
    return text[:1].upper() + text[1:]


_PLURAL = {"is": "are", "was": "were", "does": "do", "has": "have"}
