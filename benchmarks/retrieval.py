"""How often retrieval finds the fact that a prompt asks for, without a model's answer to it.

    python benchmarks/retrieval.py --model model --data z1000.json --train z300.json

Every prompt is asked in WILD's form. As taught and rephrased it should find its own edit, and an unrelated prompt none;
what it finds is its own edit's fact, another edit's, or none that is similar enough.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from wisecli.bench.bench_context import BenchContext
from wisecli.bench.methods.base import Bench
from wisecli.bench.methods.context.rag import Rag
from wisecli.bench.methods.context.rag_hybrid import RagHybrid
from wisecli.bench.methods.context.retrieval import NearestFact
from wisecli.config import BenchSettings, LoadOptions
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.wild import WILD
from wisecli.progress import ignore_progress

RETRIEVERS: dict[str, Callable[[Bench], NearestFact]] = {"rag": Rag, "rag-hybrid": RagHybrid}
_COLUMNS = ("its own", "another's", "none")


def main() -> None:
    """Print a table: shares of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="records that set the threshold of similarity")
    parser.add_argument("--of", default="rag", help=f"with commas between, of {', '.join(RETRIEVERS)}")
    arguments = parser.parse_args()
    edits, train = read_edits(arguments.data), read_edits(arguments.train)
    with TemporaryDirectory() as work:
        course = BenchContext(
            arguments.model, edits, (), train, BenchSettings(), LoadOptions(), Path(work), ignore_progress
        )
        print(f"{len(edits)} edits".ljust(26), *(name.rjust(10) for name in _COLUMNS))
        for name in arguments.of.split(","):
            retriever = RETRIEVERS[name](course.bench)
            retriever.edit(edits)
            for kind, asked in _asked(edits).items():
                texts = (WILD.render(course.bench.loaded.tokenizer, prompt) for prompt, _ in asked)
                found = map(retriever.found, texts)
                counts = Counter(_whose(one, edit) for one, (_, edit) in zip(found, asked, strict=True))
                shares = (f"{counts[column] / len(asked):.3f}".rjust(10) for column in _COLUMNS)
                print(f"{name}, {kind}".ljust(26), *shares, flush=True)


def _asked(edits: Sequence[Edit]) -> dict[str, list[tuple[str, Edit]]]:
    """Prompts with the edit that each is of, by their kind; kinds that no edit has are left out."""
    kinds = {
        "as taught": [(edit.prompt, edit) for edit in edits],
        "rephrased": [(edit.rephrases[0], edit) for edit in edits if edit.rephrases],
        "unrelated": [(edit.locality[0].prompt, edit) for edit in edits if edit.locality],
    }
    return {kind: asked for kind, asked in kinds.items() if asked}


def _whose(found: Edit | None, edit: Edit) -> str:
    """Whose fact was found for a prompt of an edit, by the column's name."""
    if found is None:
        return "none"
    return "its own" if (found.prompt, found.target) == (edit.prompt, edit.target) else "another's"


if __name__ == "__main__":
    main()
