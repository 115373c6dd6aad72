"""How retrieval should word a fact: answers to edits' prompts and rephrases behind the right fact, in several wordings.

    python benchmarks/wordings.py --model model --data zsre_3k.json --first 100 --last 150

By WILD an answer counts if it is the target, and to a bare prompt, where answers go on, if it begins with the target.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.wild import MAX_NEW_TOKENS, WILD, normalized, stop_tokens
from wisecli.models.loading import Loaded, load_model
from wisecli.models.running.generation import generate

# {question} and {answer} are the fact, {prompt} is what is asked.
WORDINGS = {
    "a new fact": "New Fact: {question} {answer}\nPrompt: {prompt}",
    "question and answer": "Q: {question}\nA: {answer}\n{prompt}",
    "with a blank line behind": "Q: {question}\nA: {answer}\n\n{prompt}",
    "the same in full words": "Question: {question}\nAnswer: {answer}\n{prompt}",
    "the fact alone": "{question} {answer}\n{prompt}",
    "a context": "Context: {question} {answer}\n{prompt}",
    "something known": "You know this: {question} {answer}\n{prompt}",
    "an instruction": "Use this fact: {question} {answer}.\n\n{prompt}",
}
_BEGINNING = 16
_COLUMNS = ("WILD", "WILD rephrased", "bare", "bare rephrased")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--last", type=int, default=150)
    arguments = parser.parse_args()
    edits = [edit for edit in read_edits(arguments.data)[arguments.first : arguments.last] if edit.rephrases]
    loaded = load_model(arguments.model)
    stops = stop_tokens(loaded.tokenizer)
    print(f"{len(edits)} edits".ljust(26), *(name.rjust(16) for name in _COLUMNS))
    for name, wording in WORDINGS.items():
        wild, bare = wording.replace("{prompt}", WILD.text), wording.replace("{prompt}", "{}")
        counts = [*_right(loaded, edits, wild, stops), *_right(loaded, edits, bare, ())]
        print(name.ljust(26), *(str(count).rjust(16) for count in counts), flush=True)


def _right(loaded: Loaded, edits: Sequence[Edit], wording: str, stops: Collection[int]) -> tuple[int, int]:
    """How many prompts and rephrases have right answers: in full where answers are stopped, else as they begin."""
    told = [wording.replace("{question}", edit.prompt).replace("{answer}", edit.target.strip()) for edit in edits]
    length = MAX_NEW_TOKENS if stops else _BEGINNING

    def right(said: str, target: str) -> bool:
        if stops:
            return normalized(said) == normalized(target)
        return said.strip().startswith(target.strip())

    def count(prompts: Sequence[str]) -> int:
        texts = [text.replace("{}", prompt) for text, prompt in zip(told, prompts, strict=True)]
        tokens = generate(loaded.model, loaded.tokenizer, texts, max_new_tokens=length, stops=stops)
        said = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sum(right(answer, edit.target) for answer, edit in zip(said, edits, strict=True))

    return count([edit.prompt for edit in edits]), count([edit.rephrases[0] for edit in edits])


if __name__ == "__main__":
    main()
