"""Asks an OpenAI-compatible server, and reads replies of any shape: whole or streamed, with reasoning or without."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from wisecli.errors import ServerError, SettingsError

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# No answer of a server is longer than this, in bytes.
_LARGEST = 1 << 24
# A server that is busy says so with one of these, and often when to come again.
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_TRIES = 5
# Tokens for a model that reasons before it answers, where its reasoning alone took all that it was given.
_REASONING = 2048
# What stands around reasoning that a server leaves in the text.
_OPENED, _CLOSED = "<think>", "</think>"
# What servers call the field in which reasoning comes apart from the answer.
_REASONING_FIELDS = ("reasoning_content", "reasoning")


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server: its address without ``/v1``, the name that it has for the model, and a key."""

    url: str
    model: str | None = None
    key: str | None = None
    timeout: float = 60.0


@dataclass(frozen=True)
class _Reply:
    """The text of a reply without its reasoning, whether it had any, and whether it ended for want of tokens."""

    text: str
    reasoned: bool
    cut: bool


def with_model_name(server: Server) -> Server:
    """Return the server with the name that it has for the model: its first, if none is given.

    Raises:
        SettingsError: the address is none.
        ServerError: the server cannot be reached, or names no model.
    """
    parts = urlsplit(server.url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingsError(f"{server.url!r} is no address; give one like http://localhost:8000")
    plain = replace(server, url=server.url.rstrip("/").removesuffix("/v1"))
    if server.model is not None:
        return plain
    try:
        models = _request(plain, "/v1/models", None)[0].get("data")
    except ServerError as error:
        remedy = "" if error.status is None else "; name the model with --model"
        raise ServerError(plain.url, error.reason + remedy, error.status) from None
    first = models[0] if isinstance(models, list) and models else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise ServerError(plain.url, "names no model at /v1/models; name one with --model")
    return replace(plain, model=first["id"])


def require_endpoint(server: Server, endpoint: str) -> None:
    """Check that a server replies by an endpoint, with any text.

    Raises:
        ServerError: it does not.
    """
    _reply(server, endpoint, "Hello", 1)


def greedy_answer(server: Server, endpoint: str, prompt: str, length: int) -> str:
    """Return a greedy answer of at most ``length`` tokens, without reasoning or white space around it; it may be empty.

    A reply that is reasoning alone is asked for once more, with room for an answer.

    Raises:
        ServerError: the server cannot be reached, refuses, or sends something that is no reply.
    """
    reply = _reply(server, endpoint, prompt, length)
    if reply.cut and reply.reasoned and not reply.text:
        reply = _reply(server, endpoint, prompt, length + _REASONING)
    return reply.text


def _reply(server: Server, endpoint: str, prompt: str, length: int) -> _Reply:
    """Return the greedy completion of a prompt, without the text of its reasoning."""
    request: dict[str, Any] = {"model": server.model, "max_tokens": length, "temperature": 0, "stream": False}
    request |= {"messages": [{"role": "user", "content": prompt}]} if endpoint == "chat" else {"prompt": prompt}
    path = ENDPOINTS[endpoint]
    text, reasoned, end = "", False, None
    for reply in _request(server, path, request):
        choices = reply.get("choices")
        if not choices and "error" not in reply and isinstance(choices, list) and "usage" in reply:
            continue  # the last piece of a stream counts tokens
        try:
            choice = choices[0]  # type: ignore[index]
            text += _text_in(choice)
            reasoned |= _reasons(choice)
            end = choice.get("finish_reason") or end
        except (KeyError, IndexError, TypeError, AttributeError):
            reason = f": {json.dumps(reply['error'])[:300]}" if "error" in reply else ""
            raise ServerError(server.url, f"answers {path} without a text{reason}") from None
    answer, inside = _without_thinking(text)
    return _Reply(answer, reasoned or inside, end == "length")


def _text_in(choice: dict[str, Any]) -> str:
    """Return the text of one choice of a reply, or of a piece of it; null is an empty text.

    Raises:
        KeyError, TypeError, AttributeError: there is nothing like a text.
    """
    if "text" in choice:
        content = choice["text"]
    else:
        content = (choice["message"] if "message" in choice else choice["delta"]).get("content")
    if isinstance(content, list):  # parts, of which reasoning is one of another type
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or ""


def _reasons(choice: dict[str, Any]) -> bool:
    """Return whether a choice has reasoning in a field of its own."""
    message = choice.get("message") or choice.get("delta") or choice
    return any(message.get(name) for name in _REASONING_FIELDS) or isinstance(message.get("content"), list)


def _without_thinking(text: str) -> tuple[str, bool]:
    """Return what follows the reasoning in a text, and whether there was any; it may never have ended.

    Chat templates often open the reasoning themselves, so that only its end is in the text.
    """
    _, closed, answer = text.rpartition(_CLOSED)
    if closed:
        return answer.strip(), True
    before, opened, _ = text.partition(_OPENED)
    return before.strip(), bool(opened)


def _request(server: Server, path: str, content: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Send a request and return the JSON objects of the response: one, or all events of a stream.

    A busy server is asked again after the delay that it names, if that is no longer than the timeout.

    Raises:
        ServerError: it cannot be reached, refuses or answers with something else.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {server.key}"} if server.key else {})}
    data = None if content is None else json.dumps(content).encode()
    for tried in range(1, _TRIES + 1):
        try:
            with urlopen(Request(server.url + path, data, headers), timeout=server.timeout) as reply:  # nosec B310 # http alone
                return list(_objects(server, path, reply))
        except HTTPError as error:
            pause = _pause(error, 2.0**tried / 2)
            if error.code not in _BUSY or tried == _TRIES or pause > server.timeout:
                reason = " ".join(error.read(300).decode(errors="replace").split())
                raise ServerError(server.url, f"answers {path} with {error.code}: {reason}", error.code) from None
            error.close()
            time.sleep(pause)
        except (URLError, OSError, HTTPException, ValueError) as error:
            raise ServerError(server.url, f"does not answer {path}: {getattr(error, 'reason', error)}") from None
    raise AssertionError("the last try returns or raises")


def _objects(server: Server, path: str, reply: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a response: each event of a stream, or the whole body."""
    body = reply.read(_LARGEST).decode()
    if reply.headers.get_content_type() == "text/event-stream" or body.startswith(("data:", ":")):
        lines = (line.removeprefix("data:").strip() for line in body.splitlines() if line.startswith("data:"))
        pieces = [line for line in lines if line and line != "[DONE]"]
    else:
        pieces = [body]
    for piece in pieces:
        content = json.loads(piece)
        if not isinstance(content, dict):
            raise ServerError(server.url, f"answers {path} with no JSON object")
        yield content


def _pause(error: HTTPError, usual: float) -> float:
    """Return the seconds to wait for a busy server: until when it says, as a number or a date, or ``usual``."""
    retry_after = error.headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return usual
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
