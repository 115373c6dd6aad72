"""Records in any layout → records by known names, and what is worth saying of how they were read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from wisecli.edits.reading.benchmark_layouts import BY_NAME, Layout, layout_of
from wisecli.edits.reading.chats import edit_of_chat, turns_passed_over
from wisecli.edits.reading.field_names import misspelt
from wisecli.edits.reading.scalar_values import with_texts
from wisecli.io.json_schema import require_sane, shown


class Notices:
    """Takes note of things while a file is read, each with the line that it is first on, and how often it is there."""

    def __init__(self, file: str) -> None:
        self._file, self._line, self._layout = file, 0, BY_NAME
        self._unread: dict[str, tuple[int, int, str | None]] = {}
        self._texts: dict[str, tuple[int, int, str]] = {}
        self._records: Counter[Layout] = Counter()
        self._edits: Counter[Layout] = Counter()
        self._first: dict[Layout, tuple[str, str]] = {}

    def at(self, line: int) -> Notices:
        """Go on to the record on a line."""
        self._line = line
        return self

    def passed_over(self, name: str, meant: str | None) -> None:
        """Take note of a field that nothing reads, and of the known name that its own is like."""
        first, count, _ = self._unread.get(name, (self._line, 0, None))
        self._unread[name] = first, count + 1, meant

    def noted(self, sentence: str) -> None:
        """Take note of a value that was no text; one of each field is quoted."""
        field = sentence.partition(" is ")[0]
        first, count, said = self._texts.get(field, (self._line, 0, sentence))
        self._texts[field] = first, count + 1, said

    def in_layout(self, layout: Layout, record: Mapping[str, Any]) -> None:
        """Take note of the layout that a record is in."""
        self._layout = layout
        self._records[layout] += 1
        if layout.read is edit_of_chat and (count := turns_passed_over(record)):
            earlier = "an earlier turn, which is" if count == 1 else f"{count} earlier turns, which are"
            self.noted(f"`{layout.fields[0]}` is a chat with {earlier} no part of the prompt")

    def took(self, edits: int, prompt: str, target: str) -> None:
        """Note what a record gave."""
        self._edits[self._layout] += edits
        self._first.setdefault(self._layout, (prompt, target))

    def warnings(self) -> Iterator[str]:
        """Give a sentence for each field that was passed over, and for each that was no text."""
        for name, (line, count, meant) in self._unread.items():
            hint = f"; did you mean `{meant}`?" if meant else ""
            yield f"{self._file}:{line}: the field {shown(name)} is unknown and was passed over{_more(count)}{hint}"
        for line, count, sentence in self._texts.values():
            yield f"{self._file}:{line}: {sentence}{_more(count)}"

    def taken(self) -> Iterator[str]:
        """Give a sentence for each layout but the plain one: what was taken from which fields, and the first edit."""
        for layout, records in self._records.items():
            if layout is not BY_NAME:
                prompt, target = self._first[layout]
                yield (
                    f"{self._file} read as {layout.name}, {_count(records, 'record')} with "
                    f"{_count(self._edits[layout], 'edit')}: "
                    f"{layout.taken}; the first is {shown(prompt)} → {shown(target)}"
                )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _more(count: int) -> str:
    return f" (and in {count - 1} more)" if count > 1 else ""


def flattened(record: Mapping[str, Any], notices: Notices) -> list[dict[str, Any]]:
    """Return a record as one or several whose fields go by names that are known.

    Raises:
        ValueError: saying what is wrong with it.
    """
    require_sane(record)
    if (found := misspelt(record)) is not None:
        raise ValueError(f"{shown(found[0])} is unknown; did you mean `{found[1]}`?")
    texts = with_texts(dict(record), notices.noted)
    layout = layout_of(texts)
    try:
        flats = layout.read(texts)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"a field is of the wrong kind for {layout.name} ({error})") from None
    notices.in_layout(layout, texts)
    return flats
