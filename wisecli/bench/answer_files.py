"""Answers kept on disk as they come, so that none is asked for again when a run is broken off."""

from __future__ import annotations

import json
from pathlib import Path

from wisecli.evaluation.answers import Answer, KnownAnswers
from wisecli.io.digest import sha256_json


class AnswerFile(dict[str, Answer]):
    """Answers by what was asked; each new one is appended to a file, a line each."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        if file.is_file():
            self._read()

    def __setitem__(self, asked: str, answer: Answer) -> None:
        super().__setitem__(asked, answer)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as stream:
            stream.write(json.dumps([asked, answer.text, answer.ended]).encode() + b"\n")

    def _read(self) -> None:
        """Take in what is there; a last line that was broken off is cut away."""
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.file.open("r+b") as stream:
                stream.truncate(whole)
        for line in content[:whole].splitlines():
            asked, text, ended = json.loads(line)
            super().__setitem__(asked, Answer(text, ended))


class AnswerFolder(dict[tuple[int, frozenset[int]], KnownAnswers]):
    """A book of answers (:data:`~wisecli.evaluation.answers.AnswerBook`) in a folder, a file for each kind."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: tuple[int, frozenset[int]]) -> KnownAnswers:
        tokens, stops = key
        self[key] = AnswerFile(self.folder / f"{tokens}-{sha256_json(sorted(stops))[:12]}.jsonl")
        return self[key]
