"""A document in Markdown or plain text → its passages: paragraphs and lists, each with the heading it stands under."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

# What stands before the document itself, from its first line on.
_FRONT_MATTER = re.compile(r"---[ \t]*\n.*?\n---[^\n]*(\n|$)", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# Characters of a passage at most, where sentences allow it, and words at least.
_LONGEST, _FEWEST = 600, 4


@dataclass(frozen=True)
class Passage:
    """What a document says in one place; ``line`` is where it begins."""

    line: int
    heading: str
    text: str

    @property
    def whole(self) -> str:
        """The passage as it is understood: behind its heading."""
        return f"{self.heading}: {self.text}" if self.heading else self.text


def passages(document: str) -> list[Passage]:
    """Return the passages of a document, in order.

    Code, tables, images and front matter are left out; links and emphasis lose their marks. Long paragraphs are cut.
    """
    found, heading = [], ""
    for line, text, is_heading in _blocks(document):
        if is_heading:
            heading = text
            continue
        for part in _cut(text):
            if len(part.split()) >= _FEWEST:
                found.append(Passage(line, heading, part))
    return found


def _blocks(document: str) -> Iterator[tuple[int, str, bool]]:
    """Yield headings, paragraphs, and lists whose items stand together: line, text, and whether it is a heading."""
    # Plain text may be indented without being code.
    parser = MarkdownIt("commonmark").enable("table").disable("code")
    tokens = parser.parse(_without_front_matter(document))
    items: list[tuple[int, str]] = []
    in_table = False
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
        is_item = before is not None and before.hidden and token.type == "inline"
        if items and ((token.level == 0 and token.nesting != 0) or (token.type == "inline" and not is_item)):
            yield items[0][0], " ".join(text for _, text in items), False
            items = []
        if token.type != "inline" or in_table or before is None:
            continue
        line, text = (token.map or [0])[0] + 1, _said(token.children or ())
        if is_item:
            items.append((line, text))
        else:
            yield line, text, before.type == "heading_open"


def _without_front_matter(document: str) -> str:
    """Return the document with as many empty lines in the place of its front matter."""
    found = _FRONT_MATTER.match(document)
    return document if found is None else "\n" * found[0].count("\n") + document[found.end() :]


def _said(children: Sequence[Token]) -> str:
    """Return the words of a paragraph on one line; nothing for a table without a head."""
    text = "".join("\n" if child.type in ("softbreak", "hardbreak") else _word(child) for child in children)
    return " ".join(" ".join(line for line in text.split("\n") if not line.startswith("|")).split())


def _word(token: Token) -> str:
    return token.content if token.type in ("text", "code_inline") else ""


def _cut(text: str) -> Iterator[str]:
    """Yield a paragraph's sentences, joined to parts that are not too long."""
    part = ""
    for sentence in _SENTENCE.split(text):
        if part and len(part) + len(sentence) >= _LONGEST:
            yield part
            part = ""
        part = f"{part} {sentence}".strip()
    yield part
