"""An OpenAI-compatible server of a model, on this machine."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"data": [{"id": "tiny"}]}
# What a server says to a prompt with so many tokens at most.
Answers = Callable[[str, int], str]
# What one says to a request (its path and its content): a status, headers, and a body as bytes or as JSON.
Replies = Callable[[str, dict[str, Any]], tuple[int, dict[str, str], Any]]


def chat_reply(text: Any, finish: str = "stop", **fields: Any) -> dict[str, Any]:
    """The body of a chat completion, with fields of the message beside its content."""
    message = {"role": "assistant", "content": text, **fields}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def asked_text(content: dict[str, Any]) -> str:
    """The prompt of a request, by either endpoint."""
    return str(content["messages"][0]["content"] if "messages" in content else content["prompt"])


@contextmanager
def replying(replies: Replies, *, models: int = 200, named: Any = MODELS) -> Iterator[str]:
    """The address of a server that names one model and says whatever it is made to; requests may overlap.

    Args:
        models: with which status it names it.
        named: what it says then.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_given: Any) -> None:
            pass

        def say(self, status: int, headers: dict[str, str], content: Any) -> None:
            told = content if isinstance(content, bytes) else json.dumps(content).encode()
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked may not have waited
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(told))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(told)

        def do_GET(self) -> None:
            self.say(models, {}, named)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.say(*replies(self.path, {**asked, "key": self.headers["Authorization"]}))

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    # With the usual five in the queue, whoever asks with more threads waits a second for another try.
    request_queue_size = 64


def served(
    answers: Answers, *, chat: bool = True, key: str | None = None, raw: bytes | None = None
) -> AbstractContextManager[str]:
    """The address of a server; requests come one after the other.

    Args:
        chat: whether it has a chat template.
        key: what it asks for.
        raw: what it says to everything, in the place of answers.
    """
    turn = threading.Lock()

    def replies(path: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if key is not None and asked["key"] != f"Bearer {key}":
            return 401, {}, {"error": "no such key"}
        assert (asked["model"], asked["temperature"]) == ("tiny", 0)
        if path.endswith("/chat/completions") and not chat:
            return 400, {}, raw or {"error": "no such thing"}
        with turn:
            text = answers(asked_text(asked), asked["max_tokens"])
        return 200, {}, raw or ({"choices": [{"text": text}]} if "prompt" in asked else chat_reply(text))

    return replying(replies, named=MODELS if raw is None else raw)
