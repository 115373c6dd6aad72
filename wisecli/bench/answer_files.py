"""Answers that are appended to files as they come, so that an interrupted run asks for none of them again."""

from pathlib import Path

from wisecli.bench.json_lines import append_line, whole_lines
from wisecli.evaluation.answers import Answer, KnownAnswers
from wisecli.io.digest import sha256_json


class AnswerFile(dict[str, Answer]):
    """Answers by prompt; each new one is appended to a file, a line each."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.update({prompt: Answer(text, ended) for prompt, text, ended in whole_lines(file)})

    def __setitem__(self, prompt: str, answer: Answer) -> None:
        super().__setitem__(prompt, answer)
        append_line(self.file, [prompt, answer.text, answer.ended])


class AnswerFolder(dict[tuple[int, frozenset[int]], KnownAnswers]):
    """A book of answers (:data:`~wisecli.evaluation.answers.AnswerBook`) in a folder, a file for each kind."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: tuple[int, frozenset[int]]) -> KnownAnswers:
        tokens, stops = key
        self[key] = AnswerFile(self.folder / f"{tokens}-{sha256_json(sorted(stops))[:12]}.jsonl")
        return self[key]
