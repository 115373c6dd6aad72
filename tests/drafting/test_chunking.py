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


def test_a_list_is_one_passage_unless_its_items_stand_apart() -> None:
    assert [
        (one.line, one.text) for one in passages("- one of four words\n  - two\n- three\n\nAnd a paragraph follows.")
    ] == [(1, "one of four words two three"), (5, "And a paragraph follows.")]
    apart = passages("1. the first of two items\n\n2. the second of two items\n")
    assert [(one.line, one.text) for one in apart] == [(1, "the first of two items"), (3, "the second of two items")]


def test_of_markup_only_the_words_are_kept() -> None:
    text = (
        "Some *words*, `code`, a [link][1], a_b_c, 2 &lt; 3 and ![a picture](p.png)\na <b>second</b> line.\n\n[1]: x\n"
    )
    assert [one.text for one in passages(text)] == ["Some words, code, a link, a_b_c, 2 < 3 and a second line."]


def test_tables_and_html_are_left_out_and_indented_text_is_no_code() -> None:
    table, block = "| head | of |\n|---|---|\n| a row of | many words |", "<div>\nno text of the page\n</div>"
    text = f"{table}\n\n{block}\n\n    An indented line of text."
    assert [(one.line, one.text) for one in passages(text)] == [(9, "An indented line of text.")]


def test_front_matter_ends_where_it_says() -> None:
    assert [
        one.line for one in passages("---\ntitle: x\n---\nThe text of the page.\n\n---\n\nAnd some more of it.")
    ] == [4, 8]
    assert len(passages("---\nThis is a rule, and no front matter.")) == 1
