"""A document in Markdown or plain text → its passages: paragraphs and lists, each with the heading it stands under."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*")
_UNDERLINE = re.compile(r"=+|-{2,}")
_FENCE = re.compile(r"(`{3,}|~{3,}).*")
# What begins a line and says nothing: bullets, numbers of lists, marks of quotations.
_MARK = re.compile(r"^(?:(?:[-*+>]|\d+[.)])\s+)+")
_SILENT = re.compile(r"\||<|!\[|\[[^\]]+\]:|[-*_ ]{3,}$")
_IMAGE, _LINK = re.compile(r"!\[[^\]]*\]\([^)]*\)"), re.compile(r"\[([^\]]*)\]\([^)]*\)")
_EMPHASIS = re.compile(r"(\*\*|__|`|(?<!\w)[*_]|[*_](?!\w))")
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
    """The passages of a document, in order.

    Code, tables, images and front matter are left out; of links and emphasis only the words are kept. Long paragraphs
    are cut between sentences.
    """
    found, heading = [], ""
    for number, lines in _blocks(document):
        title = _title(lines)
        if title is not None:
            heading = title
            continue
        text = " ".join(_plain(line) for line in lines if not _SILENT.match(line.strip()))
        for part in _cut(" ".join(text.split())):
            if len(part.split()) >= _FEWEST:
                found.append(Passage(number, heading, part))
    return found


def _blocks(document: str) -> Iterator[tuple[int, list[str]]]:
    """Lines that stand together, with the number of the first; a heading is a block of its own."""
    block: list[str] = []
    begun = 0
    for number, line in _told(document):
        heading = _HEADING.fullmatch(line.strip()) is not None
        if block and (heading or not line.strip()):
            yield begun, block
            block = []
        if heading:
            yield number, [line]
        elif line.strip():
            begun = begun if block else number
            block.append(line)
            if len(block) == 2 and _UNDERLINE.fullmatch(line.strip()):
                yield begun, block
                block = []
    if block:
        yield begun, block


def _told(document: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, those of code and front matter empty."""
    lines = document.splitlines()
    closing = "---" if lines and lines[0].strip() == "---" else ""
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.fullmatch(line.strip())
        if closing:
            closing = "" if number > 1 and line.strip().startswith(closing) else closing
        elif fence:
            closing = fence[1]
        else:
            yield number, line
            continue
        yield number, ""


def _title(lines: list[str]) -> str | None:
    found = _HEADING.fullmatch(lines[0].strip())
    if found:
        return _plain(found[1])
    underlined = len(lines) == 2 and _UNDERLINE.fullmatch(lines[1].strip())
    return _plain(lines[0]) if underlined else None


def _plain(line: str) -> str:
    text = _LINK.sub(r"\1", _IMAGE.sub("", _MARK.sub("", line.strip())))
    return _EMPHASIS.sub("", text).strip()


def _cut(text: str) -> Iterator[str]:
    part = ""
    for sentence in _SENTENCE.split(text):
        if part and len(part) + len(sentence) >= _LONGEST:
            yield part
            part = ""
        part = f"{part} {sentence}".strip()
    yield part
