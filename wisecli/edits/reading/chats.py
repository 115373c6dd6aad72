"""Chats as people keep them for training (``messages``, ShareGPT's ``conversations``) → edits."""

from collections.abc import Mapping
from typing import Any

from wisecli.io.json_schema import shown

Record = Mapping[str, Any]
Flat = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}


def turns_passed_over(record: Record) -> int:
    """Return how many turns of a chat come before the one that asks, and are no part of the prompt."""
    return max(0, len(_turns(record)) - 2)


def edit_of_chat(record: Record) -> list[Flat]:
    """Return the edit of a chat: its last question, and the assistant's answer to that.

    Raises:
        ValueError: it ends otherwise, or a turn is no text.
    """
    turns = _turns(record)
    if turns[-1][0] != "assistant":
        raise ValueError(
            f"the chat ends with a turn of the {turns[-1][0]}; it must end with the assistant's, the target"
        )
    if len(turns) < 2 or turns[-2][0] != "user":
        raise ValueError("the assistant's last turn follows no turn of the user, which would be the prompt")
    rest = {name: value for name, value in record.items() if name not in ("messages", "conversations", "completion")}
    return [{**rest, "prompt": turns[-2][1], "target": turns[-1][1]}]


def _turns(record: Record) -> list[tuple[str, str]]:
    """Return the turns of a chat, by role and text."""
    name = next((name for name in ("messages", "conversations") if record.get(name) is not None), "completion")
    messages = record[name] if name != "completion" else [*record["prompt"], *record["completion"]]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` must be a list of turns, not {shown(messages)}")
    turns = []
    for turn in messages:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str):
            raise ValueError(f"a turn of `{name}` must have a `role` and `content`, not {shown(turn)}")
        turns.append((_ROLES.get(role, role), _said(turn.get("content", turn.get("value")), name)))
    return turns


def _said(content: Any, name: str) -> str:
    """Return the text of a turn, which may come in parts."""
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"a turn of `{name}` has parts that are no text; an edit is text alone")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"a turn of `{name}` has no text, but {shown(content)}")
    return content
