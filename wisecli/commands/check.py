"""``wise check``: what a server of an edited model says to the edits, and to prompts that they leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from wisecli.artifacts.names import MEMORY, MERGED
from wisecli.data.corpus import texts_beside_gates
from wisecli.edits.record import Edit, read_edits
from wisecli.edits.text import unmarked
from wisecli.errors import ServedWrongError, ServerError, SettingsError
from wisecli.io.json_schema import decode
from wisecli.progress import Event, Watcher, ignore

# Unrelated prompts that come with the package, and tokens of their answers.
_UNRELATED, _LENGTH = 20, 24
# No answer of a server is longer than this, in bytes.
_LARGEST = 1 << 24
_ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# What a server answers that does not know an endpoint, or has no chat template.
_UNKNOWN = (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server: its address without ``/v1``, the name that it has for the model, and a key."""

    url: str
    model: str | None = None
    key: str | None = None
    timeout: float = 60.0


@dataclass(frozen=True)
class Asked:
    """A prompt by one endpoint, what was to come, what came, and whether that holds.

    ``edit`` is the edit's id, ``None`` of an unrelated prompt.
    """

    endpoint: str
    edit: str | None
    prompt: str
    expected: str
    answer: str
    holds: bool


@dataclass(frozen=True)
class CheckReport:
    """What was asked of a server, by which endpoints, and which endpoints it does not have."""

    url: str
    model: str
    asked: tuple[Asked, ...]
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        wrong = [vars(one) for one in self.asked if not one.holds]
        counts = {name: {"asked": total, "hold": held} for name, total, held in self.counts()}
        return {"results": {**counts, "failed": wrong}, "url": self.url, "model": self.model, "missing": self.missing}

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """What was asked, how often, and how often it holds."""
        for what, of_edits in (("edits", True), ("unrelated", False)):
            for endpoint in _ENDPOINTS:
                some = [one for one in self.asked if one.endpoint == endpoint and (one.edit is not None) == of_edits]
                if some:
                    yield f"{what} by {endpoint}", len(some), sum(one.holds for one in some)

    def check(self) -> None:
        """Raise if anything does not hold.

        Raises:
            ServedWrongError: with a sentence for each prompt.
        """
        wrong = [one for one in self.asked if not one.holds]
        if wrong:
            said = [f"{one.endpoint}: {one.prompt!r} gives {one.answer!r}, not {one.expected}" for one in wrong]
            raise ServedWrongError(self.url, len(self.asked), said)


def check(
    server: Server,
    edits: Path,
    *,
    base: Server | None = None,
    unrelated: Path | None = None,
    contained: bool = False,
    jobs: int = 8,
    watch: Watcher = ignore,
) -> CheckReport:
    """Ask a server the edits' own prompts and unrelated ones, greedily, as plain text and as chats.

    An edit holds if its target is the whole answer. An unrelated prompt holds if no edit's target is the answer.

    Args:
        edits: a file of edits, or a directory of a memory or an exported checkpoint, whose edits are asked.
        base: a server of the unedited model; unrelated answers must then be word for word its own.
        unrelated: a file of unrelated prompts, one a line, in the place of those that come with the package.
        contained: an edit holds if its target is anywhere in the answer.
        jobs: requests at a time.

    Raises:
        EditFileError: the edits cannot be read.
        ServerError: a server cannot be reached, refuses or answers nonsense.
    """
    records = edits_in(edits)
    others = _prompts(unrelated)
    server = _named(server)
    base = None if base is None else _named(base)
    there = [name for name in _ENDPOINTS if _has(server, name)]
    if not there:
        raise ServerError(server.url, f"has neither {' nor '.join(_ENDPOINTS.values())}")
    holds = _contains if contained else _is_all
    targets = [edit.target for edit in records if not edit.erased]
    work: list[Callable[[], Asked]] = []
    for endpoint in there:
        work += [lambda end=endpoint, edit=edit: _edit(server, end, edit, holds) for edit in records]  # type: ignore[misc]
        work += [
            lambda end=endpoint, prompt=prompt: _unrelated(server, base, end, prompt, targets)  # type: ignore[misc]
            for prompt in others
        ]
    found = []
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for one in pool.map(lambda ask: ask(), work):
            found.append(one)
            watch(Event("prompts", len(found), len(work)))
    missing = tuple(name for name in _ENDPOINTS if name not in there)
    return CheckReport(server.url, str(server.model), tuple(found), missing)


def edits_in(path: Path) -> list[Edit]:
    """The edits of a file, or those that the manifest of a memory or an exported checkpoint lists."""
    for name in (MEMORY, MERGED):
        if (path / name).is_file():
            from wisecli.io.checkpoint import read_json

            return decode(list[Edit], read_json(path / name).get("edits"), "edits")
    return read_edits(path)


def _prompts(file: Path | None) -> list[str]:
    if file is None:
        return texts_beside_gates(_UNRELATED)
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--unrelated {file}: not readable as text ({error})") from None
    if not found:
        raise SettingsError(f"--unrelated {file}: no prompt in it; write one a line")
    return found


def _edit(server: Server, endpoint: str, edit: Edit, holds: Callable[[str, str], bool]) -> Asked:
    """Ask one edit's own prompt. A target has no more tokens than bytes."""
    answer = _answer(server, endpoint, edit.prompt, min(256, len(edit.answer.encode()) + 8))
    if edit.erased and edit.replacement is None:
        right, expected = not _contains(answer, edit.target), f"without {edit.target!r}"
    else:
        right, expected = holds(answer, edit.answer), repr(edit.answer)
    return Asked(endpoint, edit.id, edit.prompt, expected, answer, right)


def _unrelated(server: Server, base: Server | None, endpoint: str, prompt: str, targets: Sequence[str]) -> Asked:
    answer = _answer(server, endpoint, prompt, _LENGTH)
    if base is not None:
        before = _answer(base, endpoint, prompt, _LENGTH)
        return Asked(endpoint, None, prompt, repr(before), answer, answer == before)
    right = not any(_is_all(answer, target) for target in targets)
    return Asked(endpoint, None, prompt, "an answer of its own", answer, right)


def _is_all(answer: str, target: str) -> bool:
    return unmarked(answer) == unmarked(target)


def _contains(answer: str, target: str) -> bool:
    return unmarked(target) in unmarked(answer)


def _named(server: Server) -> Server:
    """A server with the name that it has for the model: its first, if none is given."""
    parts = urlsplit(server.url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingsError(f"{server.url!r} is no address; give one like http://localhost:8000")
    url = server.url.rstrip("/").removesuffix("/v1")
    plain = Server(url, server.model, server.key, server.timeout)
    if server.model is not None:
        return plain
    models = _asked(plain, "/v1/models", None).get("data")
    first = models[0] if isinstance(models, list) and models else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise ServerError(url, "names no model at /v1/models; name one with --model")
    return Server(url, first["id"], server.key, server.timeout)


def _has(server: Server, endpoint: str) -> bool:
    try:
        _answer(server, endpoint, "Hello", 1)
    except ServerError as error:
        if error.status in _UNKNOWN:
            return False
        raise
    return True


def _answer(server: Server, endpoint: str, prompt: str, length: int) -> str:
    """A greedy answer of at most so many tokens, without white space around it."""
    asked: dict[str, Any] = {"model": server.model, "max_tokens": length, "temperature": 0}
    chat = endpoint == "chat"
    asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    told = _asked(server, _ENDPOINTS[endpoint], asked)
    try:
        choice = told["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
    except (KeyError, IndexError, TypeError):
        text = None
    if text is None or not isinstance(text, str):
        raise ServerError(server.url, f"answers {_ENDPOINTS[endpoint]} without a text")
    return text.strip()


def _asked(server: Server, path: str, content: dict[str, Any] | None) -> dict[str, Any]:
    """What a server answers, as JSON.

    Raises:
        ServerError: it cannot be reached, refuses or answers no JSON object.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {server.key}"} if server.key else {})}
    data = None if content is None else json.dumps(content).encode()
    try:
        with urlopen(Request(server.url + path, data, headers), timeout=server.timeout) as reply:
            told = json.loads(reply.read(_LARGEST))
    except HTTPError as error:
        said = " ".join(error.read(300).decode(errors="replace").split())
        raise ServerError(server.url, f"answers {path} with {error.code}: {said}", error.code) from None
    except (URLError, OSError, HTTPException, ValueError) as error:
        raise ServerError(server.url, f"does not answer {path}: {getattr(error, 'reason', error)}") from None
    if not isinstance(told, dict):
        raise ServerError(server.url, f"answers {path} with no JSON object")
    return told
