"""Texts with something wrong anywhere in them: bytes changed, lost, there twice or put in; seeded."""

import random
from collections.abc import Iterator

# What readers trip over: structure, ends of numbers and of text, escapes, what steers a terminal, names of fields.
_SPLICES: tuple[bytes, ...] = (
    *(b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"=", b"\\", b"\n", b"\r", b"\t", b"#", b"[[", b'"""', b"'''"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e400", b"-0", b"0x1F", b"9" * 400, b"1979-05-27", b"07:32:00"),
    *(
        b"\x00",
        b"\x1b[2J",
        b"\x7f",
        b"\xff",
        b"\xc3",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xe2\x80\xae",
        b"\xe2\x80\xa8",
    ),
    *(b"\\ud800", b"\\u0000", b"\\x00", b"../", b"/etc/passwd", b"{" * 300, b"[" * 300, b"a." * 300, b" " * 300),
    *(b'"op": "erase"', b'"prompt": ""', b'"target": null', b'"schema": 1', b"[edit]\n", b"passes = -1\n", b"x = 1\n"),
)


def wrong(sources: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """So many of the sources with up to four things wrong in each."""
    chance = random.Random(seed)
    for _ in range(count):
        content = chance.choice(sources)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            content = _spoilt(content, sources, chance)
        yield content


def _spoilt(content: bytes, sources: list[bytes], chance: random.Random) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    near = min(len(content), first + chance.randrange(1, 12))
    how = chance.randrange(7)
    if how == 0:  # other bits
        place = min(first, max(0, len(content) - 1))
        return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    if how == 1:  # a hole
        return content[:first] + content[near:]
    if how == 2:  # cut off
        return content[:last]
    if how == 3:  # there twice
        return content[:near] + content[first:near] + content[near:]
    if how == 4:  # a piece of another
        other = chance.choice(sources)
        start = chance.randrange(len(other) + 1)
        return content[:first] + other[start : start + 40] + content[near:]
    splice = chance.choice(_SPLICES)
    return content[:first] + splice + content[first if how == 5 else near :]
