from __future__ import annotations

from wisecli.drafting.chunking import Passage, passages

PAGE = """---
title: not said
---
# The ferry

The ferry of Oldbridge leaves from **pier nine** every [hour](times.html).

```
code is not read at all
```

- It carries sixty people and two carts.

| a table | of numbers |

Harbour
-------
The harbour was built in 1811 by Ada Finch.
"""


def test_paragraphs_come_with_their_heading_and_line() -> None:
    assert passages(PAGE) == [
        Passage(6, "The ferry", "The ferry of Oldbridge leaves from pier nine every hour."),
        Passage(12, "The ferry", "It carries sixty people and two carts."),
        Passage(18, "Harbour", "The harbour was built in 1811 by Ada Finch."),
    ]
    assert passages(PAGE)[0].whole.startswith("The ferry: The ferry of Oldbridge")


def test_long_paragraphs_are_cut_between_sentences() -> None:
    sentences = [f"Sentence number {number} says a little of this and that." for number in range(40)]
    found = passages(" ".join(sentences))
    assert len(found) > 2
    assert " ".join(one.text for one in found) == " ".join(sentences)
    assert max(len(one.text) for one in found) <= 600


def test_what_says_nothing_has_no_passage() -> None:
    assert passages("") == []
    assert passages("# Title only\n\n![picture](a.png)\n\n---\n") == []
