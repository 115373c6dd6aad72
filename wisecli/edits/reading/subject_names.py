"""Finds the subject that a prompt names, for edits that state none."""

import re

# A quoted term is what it is about, whatever else has a capital.
_QUOTED = re.compile(r"[\"“„«「『]([^\"“”„«»「」『』]{2,80})[\"”“»」』]")
_WORD = re.compile(r"\w(?:[\w'’&/-]|\.(?=\w))*")
# What joins the words of one name: "University of the Arts", "J. de Gaulle", "Thomas, 1st Duke".
_JOINED = re.compile(
    r"(?:, |(?<=\b\w)\. | )?"
    r"(?:(?:of|the|de|la|le|du|des|del|di|da|dos|von|van|der|den|and|&|for|al|el|bin|ibn|y) ){0,2}"
)
# Words that begin a sentence with a capital and name nothing.
_OPENING = re.compile(
    r"a|about|according|after|also|an|and|are|as|at|because|before|between|but|by|can|could|did|do|does|during|for|from"
    r"|give|had|has|have|her|his|how|if|in|into|is|it|its|most|my|name|next|of|on|one|or|our|over|please|since|tell"
    r"|that|the|their|there|these|this|those|through|to|under|until|was|were|what|when|where|which|who|whom|whose|why"
    r"|will|with|would|your",
    re.IGNORECASE,
)
# Shorter than this a sentence's first word is no name.
_MIN_FIRST_WORD = 3


def named_subject(prompt: str) -> str | None:
    """Return the term that a prompt quotes, or else the first of its longest names; None if it has neither.

    A name is a run of words with capitals or digits. A sentence's first word has its capital anyway: alone it is a name
    only in a statement that has no other, and never if it is a question word, an article or the like.
    """
    if quoted := _QUOTED.findall(prompt):
        return str(max(quoted, key=len)).strip()
    names = _names(prompt)
    inner = [name for name, alone in names if not alone]
    if inner:
        return max(inner, key=len)
    first = names[0][0] if names else ""
    return first if len(first) >= _MIN_FIRST_WORD and not prompt.rstrip().endswith(("?", "？")) else None


def _names(prompt: str) -> list[tuple[str, bool]]:
    """Return the names in a prompt, and whether each is nothing but a sentence's first word."""
    spans: list[tuple[int, int, bool]] = []
    for word in _WORD.finditer(prompt):
        start, end = word.span()
        opens = re.search(r"(?:^|[.!?:])\W*$", prompt[:start]) is not None
        text = word.group()
        if not (text[0].isupper() or any(letter.isdigit() for letter in text)):
            continue
        if spans and _JOINED.fullmatch(prompt, spans[-1][1], start):
            spans[-1] = (spans[-1][0], end, False)
        elif not (opens and _OPENING.fullmatch(text)):
            spans.append((start, end, opens))
    return [(re.sub(r"['’]s$", "", prompt[start:end]), alone) for start, end, alone in spans]
