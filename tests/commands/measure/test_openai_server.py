"""Replies of the shapes that servers have, most of them from bug reports on inference servers and their clients."""

import json
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from support.serving import asked_text, chat_reply, replying
from support.tiny_models import Wise

from wisecli.commands.measure import openai_server
from wisecli.commands.measure.openai_server import Server, greedy_answer, with_model_name
from wisecli.errors import ServerError

PROMPT, TARGET = "The mayor of Oldbridge is", "Ada Finch"
Reply = tuple[int, dict[str, str], Any]


@pytest.fixture
def edits() -> Path:
    path = Path("edits.jsonl")
    others = [{"prompt": f"Question {number}", "target": f"answer {number}"} for number in range(3)]
    path.write_text("".join(json.dumps(edit) + "\n" for edit in ({"prompt": PROMPT, "target": TARGET}, *others)))
    return path


def right(content: dict[str, Any]) -> str:
    """What a server says that holds the edits."""
    asked = asked_text(content)
    return {PROMPT: TARGET}.get(asked, asked.replace("Question", "answer") if "Question" in asked else "something")


def sound(path: str, content: dict[str, Any]) -> Reply:
    said = right(content)
    return 200, {}, chat_reply(said) if "chat" in path else {"choices": [{"text": said}]}


def answer(reply: Any, endpoint: str = "chat", **headers: str) -> str:
    with replying(lambda _path, _content: (200, headers, reply)) as url:
        return greedy_answer(Server(url, "tiny"), endpoint, PROMPT, 8)


def check(wise: Wise, url: str, edits: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    outcome = wise("check", url, "--edits", edits, "--json", *more)
    return outcome.code, json.loads(outcome.out) if outcome.out else {}, outcome.err


@pytest.mark.parametrize(
    "reply",
    [
        chat_reply(None),
        chat_reply(None, reasoning_content="It asks for"),
        chat_reply(None, refusal="I cannot"),
        chat_reply(None, "tool_calls", tool_calls=[]),
        chat_reply(""),
        {"choices": [{"message": {"role": "assistant"}}]},
        {"choices": [{"text": None}]},
    ],
)
def test_a_reply_without_content_is_an_empty_answer(reply: Any) -> None:
    """Bug reports on inference servers: `content` is null where a reasoning parser took all, or nothing was said."""
    assert answer(reply) == ""


def test_an_empty_reply_to_one_prompt_does_not_end_the_check(wise: Wise, edits: Path) -> None:
    """Bug reports on inference servers: the probe at one token, and one of the prompts, come back as null."""

    def replies(path: str, content: dict[str, Any]) -> Reply:
        empty = "chat" in path and (content["max_tokens"] == 1 or asked_text(content) == PROMPT)
        return (200, {}, chat_reply(None, "length", reasoning_content="H")) if empty else sound(path, content)

    with replying(replies) as url:
        code, told, _ = check(wise, url, edits)
    assert (code, told["missing"]) == (1, [])
    assert told["results"]["edits by chat"] == {"asked": 4, "hold": 3}
    assert told["results"]["edits by completions"] == {"asked": 4, "hold": 4}
    assert told["results"]["unrelated by chat"] == {"asked": 20, "hold": 20}
    assert [(one["prompt"], one["answer"], one["error"]) for one in told["results"]["failed"]] == [(PROMPT, "", "")]


@pytest.mark.parametrize("status", [200, 400, 403, 404, 405, 422, 500, 501])
def test_an_endpoint_is_missing_whatever_a_server_says_of_it(wise: Wise, edits: Path, status: int) -> None:
    """Bug reports on servers and proxies: without an endpoint they answer with 422, 500, or 200 and a page."""
    no_answer = b"<!doctype html>" if status == 200 else {"detail": "no such thing"}

    def replies(path: str, content: dict[str, Any]) -> Reply:
        return (status, {}, no_answer) if "chat" in path else sound(path, content)

    with replying(replies) as url:
        code, told, err = check(wise, url, edits)
    assert (code, told["missing"]) == (0, ["chat"])
    says = "does not answer /v1/chat/completions" if status == 200 else f"answers /v1/chat/completions with {status}"
    assert f"cannot be asked by chat, which was left out: it {says}" in err


def test_prompts_that_fail_are_named_and_the_others_asked(wise: Wise, edits: Path) -> None:
    """Bug reports on clients: one timeout or one 500 among a thousand requests lost the whole run."""
    ended = Event()

    def replies(path: str, content: dict[str, Any]) -> Reply:
        said = asked_text(content)
        if said == "Question 0":
            ended.wait(30)
        if said == "Question 1":
            return 500, {}, {"error": "out of memory"}
        if said == "Question 2":
            return 200, {}, {"error": {"message": "the upstream went away"}}
        return (404, {}, {}) if "chat" in path else sound(path, content)

    with replying(replies) as url:
        code, told, _ = check(wise, url, edits, "--timeout", "2")
        ended.set()
        people = wise("check", url, "--edits", edits, "--timeout", "2")
    assert code == 1
    assert told["results"]["edits by completions"] == {"asked": 4, "hold": 1}
    assert told["results"]["unrelated by completions"] == {"asked": 20, "hold": 20}
    errors = {one["prompt"]: one["error"] for one in told["results"]["failed"]}
    assert "timed out" in errors["Question 0"]
    assert errors["Question 1"] == 'answers /v1/completions with 500: {"error": "out of memory"}'
    assert "the upstream went away" in errors["Question 2"]
    assert "completions: 'Question 1' has no answer (answers /v1/completions with 500" in people.err


def busy(status: int, headers: dict[str, str], times: int) -> tuple[Callable[[str, dict[str, Any]], Reply], list[str]]:
    """A server that is busy so many times before it answers, and what it was asked."""
    asked: list[str] = []

    def replies(path: str, content: dict[str, Any]) -> Reply:
        asked.append(path)
        return (status, headers, {"error": "slow down"}) if len(asked) <= times else sound(path, content)

    return replies, asked


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("after", ["0", "0.01", formatdate(0, usegmt=True), formatdate(0)])
def test_a_busy_server_is_asked_again_when_it_says(status: int, after: str) -> None:
    """Bug reports on clients of rate-limited servers: `Retry-After` is a number or a date, and was passed over."""
    replies, asked = busy(status, {"Retry-After": after}, 2)
    with replying(replies) as url:
        assert greedy_answer(Server(url, "tiny"), "chat", PROMPT, 8) == TARGET
    assert len(asked) == 3


def test_a_busy_server_that_says_nothing_is_asked_again_a_little_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug reports on clients of rate-limited servers: 429 without `Retry-After`, or with one that means nothing."""
    pauses: list[float] = []
    monkeypatch.setattr(openai_server, "time", SimpleNamespace(sleep=pauses.append))
    for headers in ({}, {"Retry-After": "soon"}):
        replies, asked = busy(429, headers, 1)
        with replying(replies) as url:
            assert greedy_answer(Server(url, "tiny"), "chat", PROMPT, 8) == TARGET
        assert len(asked) == 2
    assert pauses == [1, 1]


def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for() -> None:
    """Bug reports on clients of rate-limited servers: they slept for the hours that a quota takes."""
    replies, asked = busy(429, {"Retry-After": "86400"}, 9)
    with replying(replies) as url, pytest.raises(ServerError, match=r"with 429: .*slow down"):
        greedy_answer(Server(url, "tiny"), "chat", PROMPT, 8)
    assert len(asked) == 1


def stream(*pieces: Any) -> bytes:
    lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    return "".join((": keep-alive\n\n", *lines, "data: [DONE]\n\n")).encode()


def deltas(*texts: str | None, **fields: Any) -> list[dict[str, Any]]:
    return [{"choices": [{"delta": {"content": text, **fields}, "finish_reason": None}]} for text in texts]


@pytest.mark.parametrize("headers", [{"Content-Type": "text/event-stream"}, {"Content-Type": "text/event-stream; x=y"}])
def test_a_streamed_reply_is_put_together(headers: dict[str, str]) -> None:
    """Bug reports on proxies: they stream although nobody asked, with empty pieces at the start and the end."""
    begin: dict[str, Any] = {"choices": [{"delta": {"role": "assistant"}}]}
    usage: dict[str, Any] = {"choices": [], "usage": {"completion_tokens": 2}}
    body = stream(begin, *deltas(None, reasoning_content="hm"), *deltas("Ada", " Fin", "ch", None), usage)
    assert answer(body, **headers) == TARGET
    assert answer(stream({"choices": [{"text": " Ada"}]}, {"choices": [{"text": " Finch"}]}), "completions") == TARGET


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    """Bug reports on proxies: an error comes in the middle of a stream whose status was 200."""
    with pytest.raises(ServerError, match=r"without a text: .*overloaded"):
        answer(stream(*deltas("Ada"), {"error": {"message": "overloaded"}}))
    with pytest.raises(ServerError, match="does not answer"):
        answer(stream(*deltas("Ada"))[:-40], **{"Content-Type": "text/event-stream"})


@pytest.mark.parametrize(
    "reply",
    [
        chat_reply(TARGET, reasoning_content="Oldbridge is a town. Its mayor is Tom Vale?"),
        chat_reply(TARGET, reasoning="Oldbridge is a town."),
        chat_reply(f"<think>\nOldbridge is a town.\n</think>\n\n{TARGET}"),
        chat_reply(f"Oldbridge is a town.\n</think>\n\n{TARGET}"),
        chat_reply(f"<think></think>{TARGET}"),
        chat_reply(
            [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": TARGET}]
        ),
        {"choices": [{"text": f"<think>a town</think> {TARGET}"}]},
    ],
)
def test_reasoning_is_no_part_of_the_answer(reply: Any) -> None:
    """Bug reports on servers of reasoning models: it comes in a field of its own, in parts, or in the text."""
    assert answer(reply) == TARGET


@pytest.mark.parametrize(
    "cut", [chat_reply(None, "length", reasoning_content="Oldbridge"), chat_reply("<think>Oldbridge is", "length")]
)
def test_reasoning_that_took_all_tokens_gets_room_for_an_answer(cut: dict[str, Any]) -> None:
    """Bug reports on servers of reasoning models: with few tokens the reasoning is cut, and nothing is said."""
    lengths: list[int] = []

    def replies(path: str, content: dict[str, Any]) -> Reply:
        lengths.append(content["max_tokens"])
        return (200, {}, cut) if content["max_tokens"] < 100 else sound(path, content)

    with replying(replies) as url:
        assert greedy_answer(Server(url, "tiny"), "chat", PROMPT, 8) == TARGET
    assert lengths == [8, 2056]


def test_unfinished_reasoning_is_no_answer() -> None:
    """Bug reports on servers of reasoning models: reasoning without an end was taken for what was said."""
    assert answer(chat_reply("<think>Ada Finch")) == ""


@pytest.mark.parametrize("reply", [chat_reply(7), chat_reply([7]), chat_reply([{"type": "text"}]), {"choices": [7]}])
def test_what_is_no_text_is_no_answer(reply: Any) -> None:
    """Mock servers: of all shapes that the fields may have, those that mean nothing."""
    with pytest.raises(ServerError, match="without a text"):
        answer(reply)


def test_a_server_that_lists_no_models_can_be_asked_by_name() -> None:
    """Bug reports on servers: not all of them have `/v1/models`."""
    with replying(sound, models=404) as url:
        with pytest.raises(ServerError, match="name the model with --model"):
            with_model_name(Server(url))
        assert with_model_name(Server(f"{url}/v1/", "tiny")) == Server(url, "tiny")
