"""``wise check``: what a server of an edited model says to the edits, and to prompts that they leave alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wisecli.artifacts.file_names import MEMORY, MERGED
from wisecli.commands.measure.openai_server import ENDPOINTS, Server, greedy_answer, require_endpoint, with_model_name
from wisecli.data.corpus import texts_to_measure_with
from wisecli.edits.record import Edit, read_edits
from wisecli.edits.text import unmarked
from wisecli.errors import ServedWrongError, ServerError, SettingsError
from wisecli.io.json_schema import decode
from wisecli.progress import Event, ProgressCallback, ignore_progress

# Unrelated prompts that come with the package, and tokens of their answers.
_UNRELATED, _LENGTH = 20, 24


@dataclass(frozen=True)
class CheckedAnswer:
    """A prompt by one endpoint, what was to come, what came, and whether that holds.

    ``edit`` is the edit's id, ``None`` of an unrelated prompt. ``error`` says why no answer came, where none did: that
    does not hold, whereas an empty answer is an answer.
    """

    endpoint: str
    edit: str | None
    prompt: str
    expected: str
    answer: str
    holds: bool
    error: str = ""

    @property
    def sentence(self) -> str:
        """The answer that came instead of the right one, in a sentence."""
        came = f"has no answer ({self.error})" if self.error else f"gives {self.answer!r}, not {self.expected}"
        return f"{self.endpoint}: {self.prompt!r} {came}"


@dataclass(frozen=True)
class CheckReport:
    """What was asked of a server, by which endpoints, and which endpoints it does not have, each with what it said."""

    url: str
    model: str
    asked: tuple[CheckedAnswer, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        wrong = [vars(answer) for answer in self.asked if not answer.holds]
        counts = {name: {"asked": total, "hold": held} for name, total, held in self.counts()}
        return {
            "results": {**counts, "failed": wrong},
            "url": self.url,
            "model": self.model,
            "missing": list(self.missing),
        }

    def counts(self) -> Iterator[tuple[str, int, int]]:
        """Yield what was asked, how often, and how often the answer was right."""
        for what, of_edits in (("edits", True), ("unrelated", False)):
            for endpoint in ENDPOINTS:
                asked = [answer for answer in self.asked if answer.endpoint == endpoint]
                hold = [answer.holds for answer in asked if (answer.edit is not None) == of_edits]
                if hold:
                    yield f"{what} by {endpoint}", len(hold), sum(hold)

    def check(self) -> None:
        """Raise if anything does not hold.

        Raises:
            ServedWrongError: with a sentence for each prompt.
        """
        wrong = [answer for answer in self.asked if not answer.holds]
        if wrong:
            raise ServedWrongError(self.url, len(self.asked), [answer.sentence for answer in wrong])


def check(
    server: Server,
    edits: Path,
    *,
    base: Server | None = None,
    unrelated: Path | None = None,
    contained: bool = False,
    jobs: int = 8,
    on_progress: ProgressCallback = ignore_progress,
) -> CheckReport:
    """Ask a server the edits' own prompts and unrelated ones, greedily, as plain text and as chats.

    An edit holds if its target is the whole answer. An unrelated prompt holds if no edit's target is the answer. A
    prompt that the server has no answer to does not hold, and the others are asked all the same.

    Args:
        edits: a file of edits, or a directory of a memory or an exported checkpoint, whose edits are asked.
        base: a server of the unedited model; unrelated answers must then be word for word its own.
        unrelated: a file of unrelated prompts, one a line, in the place of those that come with the package.
        contained: an edit holds if its target is anywhere in the answer.
        jobs: requests at a time.

    Raises:
        EditFileError: the edits cannot be read.
        ServerError: a server names no model, or answers by no endpoint.
    """
    records = edits_in(edits)
    others = _prompts(unrelated)
    server = with_model_name(server)
    base = None if base is None else with_model_name(base)
    missing = _missing(server)
    there = [name for name in ENDPOINTS if name not in missing]
    if not there:
        reasons = "; ".join(dict.fromkeys(missing.values()))
        raise ServerError(server.url, f"has neither {' nor '.join(ENDPOINTS.values())}: it {reasons}")
    holds = _contains if contained else _is_all
    targets = [edit.target for edit in records if not edit.erased]
    work: list[Callable[[], CheckedAnswer]] = []
    for endpoint in there:
        work += [lambda end=endpoint, edit=edit: _edit(server, end, edit, holds) for edit in records]  # type: ignore[misc]
        work += [
            lambda end=endpoint, prompt=prompt: _unrelated(server, base, end, prompt, targets)  # type: ignore[misc]
            for prompt in others
        ]
    found = []
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for answer in pool.map(lambda ask: ask(), work):
            found.append(answer)
            on_progress(Event("prompts", len(found), len(work)))
    return CheckReport(server.url, str(server.model), tuple(found), missing)


def edits_in(path: Path) -> list[Edit]:
    """Return the edits of a file, or those that the manifest of a memory or an exported checkpoint lists."""
    for name in (MEMORY, MERGED):
        if (path / name).is_file():
            from wisecli.io.checkpoint import read_json

            return decode(list[Edit], read_json(path / name).get("edits"), "edits")
    return read_edits(path)


def _prompts(file: Path | None) -> list[str]:
    """Return the unrelated prompts of a file, one a line; without a file, those of the package."""
    if file is None:
        return texts_to_measure_with(_UNRELATED)
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--unrelated {file}: not readable as text ({error})") from None
    if not found:
        raise SettingsError(f"--unrelated {file}: no prompt in it; write one a line")
    return found


def _missing(server: Server) -> dict[str, str]:
    """Return the endpoints by which a server answers nothing, each with what it says instead.

    Servers without an endpoint, or without a chat template, say so in many ways: 400, 404, 422, 500, a page.
    """
    found = {}
    for name in ENDPOINTS:
        try:
            require_endpoint(server, name)
        except ServerError as error:
            found[name] = error.reason
    return found


def _edit(server: Server, endpoint: str, edit: Edit, holds: Callable[[str, str], bool]) -> CheckedAnswer:
    """Ask one edit's own prompt. A target has no more tokens than bytes."""
    erased = edit.erased
    expected = f"without {edit.target!r}" if erased else repr(edit.answer)
    try:
        answer = greedy_answer(server, endpoint, edit.prompt, min(256, len(edit.answer.encode()) + 8))
    except ServerError as error:
        return CheckedAnswer(endpoint, edit.id, edit.prompt, expected, "", holds=False, error=error.reason)
    right = not _contains(answer, edit.target) if erased else holds(answer, edit.answer)
    return CheckedAnswer(endpoint, edit.id, edit.prompt, expected, answer, right)


def _unrelated(
    server: Server, base: Server | None, endpoint: str, prompt: str, targets: Sequence[str]
) -> CheckedAnswer:
    """Return how an unrelated prompt is answered: as the base server answers, or else by none of the edits' targets."""
    expected = "an answer of its own"
    try:
        answer = greedy_answer(server, endpoint, prompt, _LENGTH)
        before = None if base is None else greedy_answer(base, endpoint, prompt, _LENGTH)
    except ServerError as error:
        return CheckedAnswer(endpoint, None, prompt, expected, "", holds=False, error=str(error))
    if before is not None:
        return CheckedAnswer(endpoint, None, prompt, repr(before), answer, answer == before)
    right = not any(_is_all(answer, target) for target in targets)
    return CheckedAnswer(endpoint, None, prompt, expected, answer, right)


def _is_all(answer: str, target: str) -> bool:
    return unmarked(answer) == unmarked(target)


def _contains(answer: str, target: str) -> bool:
    return unmarked(target) in unmarked(answer)
