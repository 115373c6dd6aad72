"""What llama.cpp answers from a stock checkpoint's GGUF files, beside the base model's own files of the same kind.

    scripts/serving-venv DIR
    python benchmarks/gguf_answers.py model stock --llama DIR/bin/python

The edits' own prompts and unrelated ones, plain and as chats, are answered greedily. An edit holds if its target is the
whole answer, an unrelated prompt if its answer is word for word that of the base model's file. Logits are those after
the prompts, less those of the stock checkpoint in transformers; "tokens" counts prompts that both split alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from wisecli.edits.record import Edit

_ANSWER, _LONGER = 16, 4


def serve(path: str) -> None:
    """In the environment that has llama.cpp: answer standard input's request, one line, with one line."""
    import numpy as np
    from llama_cpp import Llama, llama_get_logits_ith

    request = json.loads(sys.stdin.readline())
    model = Llama(path, n_ctx=1024, n_threads=request["threads"], verbose=False)

    def logits() -> Any:
        return np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))

    told, ends = [], []
    for text, tokens in request["prompts"]:
        prompt = model.tokenize(text.encode(), special=True)
        model.reset()
        model.eval(prompt)
        ends.append(logits().copy())
        answer: list[int] = []
        while len(answer) < tokens:
            best = int(np.argmax(logits()))
            if best == model.token_eos():
                break
            answer.append(best)
            model.eval([best])
        said = model.detokenize(answer).decode(errors="replace")
        told.append({"prompt": prompt, "text": said.strip()})
    np.save(request["logits"], np.stack(ends))
    sys.stdout.write(json.dumps(told) + "\n")


@dataclass(frozen=True)
class Prompt:
    """A text and how many tokens its answer may take; ``target`` is an edit's, ``None`` of an unrelated prompt."""

    text: str
    chat: bool
    tokens: int
    target: str | None


def prompts_of(tokenizer: Any, edits: Sequence[Edit], unrelated: Sequence[str]) -> list[Prompt]:
    """Everything that is asked, plain and as a chat."""
    from wisecli.models.prompts.chat_template import chat_prompt

    found = []
    for prompt, target in (*((edit.prompt, edit.answer) for edit in edits), *((text, None) for text in unrelated)):
        tokens = _ANSWER if target is None else len(tokenizer(target)["input_ids"]) + _LONGER
        found.append(Prompt(prompt, False, tokens, target))
        if tokenizer.chat_template:
            found.append(Prompt(chat_prompt(tokenizer, prompt), True, tokens, target))
    return found


def answers(python: str, path: Path, asked: Sequence[Prompt], threads: int) -> list[dict[str, Any]]:
    """What llama.cpp gives for each prompt; it leaves the logits (n, V) after them beside the file."""
    told = {"threads": threads, "prompts": [(one.text, one.tokens) for one in asked], "logits": str(logits_at(path))}
    request = json.dumps(told)
    command = [python, __file__, "--serve", str(path)]
    done = subprocess.run(command, input=request, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def logits_at(path: Path) -> Path:
    """Where the logits that a file gives are kept."""
    return path.with_suffix(".npy")


def logits_of(model: PreTrainedModel, tokenizer: Any, asked: Sequence[Prompt]) -> list[tuple[list[int], Any]]:
    """Transformers' tokens of each prompt, and the logits (V,) after it."""
    import torch

    found = []
    with torch.no_grad():
        for one in asked:
            tokens = tokenizer(one.text)["input_ids"]
            logits = model(input_ids=torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].float().numpy()
            found.append((tokens, logits))
    return found


def held(asked: Sequence[Prompt], own: Sequence[Any], expected: Sequence[str], *, edit: bool, chat: bool) -> str:
    """How many of one kind of prompts hold, of how many."""
    right = [
        mine["text"] == text
        for one, mine, text in zip(asked, own, expected, strict=True)
        if (one.target is not None) == edit and one.chat == chat
    ]
    return f"{sum(right)}/{len(right)}"


def measure(given: argparse.Namespace) -> None:
    """Write the files, ask them, and print a table."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wisecli.data.corpus import texts_beside_gates
    from wisecli.export.gguf.gguf_file import write_gguf
    from wisecli.export.stock.stock_manifest import read_gated

    manifest = read_gated(given.stock)
    tokenizer = AutoTokenizer.from_pretrained(given.stock)
    model = AutoModelForCausalLM.from_pretrained(given.stock, dtype="float32").eval()
    unrelated = texts_beside_gates(given.unrelated)
    asked = prompts_of(tokenizer, manifest.edits, unrelated)
    wanted = logits_of(model, tokenizer, asked)
    table = Table(title=f"{len(manifest.edits)} edits in llama.cpp, {len(unrelated)} unrelated prompts")
    heads = ("file", "MB", "edits", "edits, chat", "unrelated", "unrelated, chat", "tokens", "logits, mean", "most")
    for name in heads:
        table.add_column(name, justify="left" if name == "file" else "right")
    for quantize in given.quantize.split(","):
        with tempfile.TemporaryDirectory(dir=given.work) as work:
            edited, plain = Path(work) / "edited.gguf", Path(work) / "base.gguf"
            write_gguf(edited, given.stock, manifest.blocks, quantize)
            write_gguf(plain, given.base, (), quantize)
            found = answers(given.llama, edited, asked, given.threads)
            before = answers(given.llama, plain, asked, given.threads)
            size, logits = edited.stat().st_size / 1e6, np.load(logits_at(edited))
        expected = [
            base["text"] if one.target is None else one.target.strip() for one, base in zip(asked, before, strict=True)
        ]
        kinds = [(edit, chat) for edit in (True, False) for chat in (False, True)]
        counts = [held(asked, found, expected, edit=edit, chat=chat) for edit, chat in kinds]
        apart = np.abs(logits - np.stack([own for _, own in wanted]))
        alike = sum(one["prompt"] == tokens for one, (tokens, _) in zip(found, wanted, strict=True))
        spread = f"{np.mean(apart):.4f}", f"{np.max(apart):.3f}"
        table.add_row(quantize, f"{size:.0f}", *counts, f"{alike}/{len(asked)}", *spread)
        for one, mine, text in zip(asked, found, expected, strict=True):
            if mine["text"] != text:
                print(f"{quantize}: {one.text!r}: {mine['text']!r}, not {text!r}", file=sys.stderr)
    Console(width=120).print(table)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("base", type=Path, nargs="?", help="the base model's directory")
    parser.add_argument("stock", type=Path, nargs="?", help="what `wise export --format stock` wrote")
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--quantize", default="f32,f16,q8_0")
    parser.add_argument("--unrelated", type=int, default=60, help="how many of the 120 that no gate was fitted to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where files are written; they are removed")
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
    else:
        measure(given)


if __name__ == "__main__":
    main()
