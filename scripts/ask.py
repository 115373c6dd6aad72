"""Ask a base model and an exported checkpoint the same questions, with transformers alone, and compare.

Usage: ask.py BASE EXPORTED EDITS.jsonl UNRELATED.txt

Ends with 1 if the exported checkpoint misses an edited answer, or says anything but the base model's text to a prompt
that no edit is about.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

NEW_TOKENS = 16


def answers(directory: str, prompts: list[str]) -> list[str]:
    """Greedy answers, all prompts in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=True)  # nosec B615 # of this disk
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)  # nosec B615 # of this disk
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def main(base: str, exported: str, edits_file: str, unrelated_file: str) -> int:
    """Print both models' answers side by side; returns the exit code."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    edits = [json.loads(line) for line in Path(edits_file).read_text(encoding="utf-8").splitlines()]
    unrelated = Path(unrelated_file).read_text(encoding="utf-8").splitlines()
    prompts = [edit["prompt"] for edit in edits] + unrelated
    before, after = answers(base, prompts), answers(exported, prompts)
    wanted = [edit["target"] for edit in edits] + before[len(edits) :]
    table = Table("prompt", "before", "after", "", title="answers, before and after")
    for prompt, old, new, right in zip(prompts, before, after, wanted, strict=True):
        table.add_row(prompt, old, new, "ok" if new == right else "WRONG")
    Console().print(table)
    wrong = sum(new != right for new, right in zip(after, wanted, strict=True))
    Console().print(f"{len(edits)} edited and {len(unrelated)} unrelated prompts, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
