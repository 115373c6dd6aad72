"""What rivals would do with other settings, other wordings, and how often retrieval finds the fact that is asked for.

python benchmarks/rivals.py settings --model model --data zsre_mend_edit.json --edits 30 -o rivals/
python benchmarks/rivals.py settings --model model --data z500.json --edits 10,100,500 --of ultraedit -o steps/
python benchmarks/rivals.py wordings --model model --data zsre_3k.json --first 100 --last 150
python benchmarks/rivals.py retrieval --model model --data z1000.json --train z300.json
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from runner import Row, run, show

from wisecli.bench.bench_context import BenchContext
from wisecli.bench.compare import bench as run_bench
from wisecli.bench.methods import load_methods
from wisecli.bench.methods.base import AT_ONCE, METHODS, Bench, Maker
from wisecli.bench.methods.context.rag import Rag
from wisecli.bench.methods.context.rag_hybrid import RagHybrid
from wisecli.bench.methods.context.rag_shots import RagShots
from wisecli.bench.methods.context.retrieval import NearestFact
from wisecli.bench.methods.weights.alphaedit import AlphaEdit, AlphaEditSettings
from wisecli.bench.methods.weights.crispedit import CrispEdit, CrispEditSettings
from wisecli.bench.methods.weights.ft_ewc import FtEwc
from wisecli.bench.methods.weights.memit import Memit, MemitSettings
from wisecli.bench.methods.weights.ultraedit import UltraEdit, UltraEditSettings
from wisecli.bench.reporting.html_tables import markdown
from wisecli.cli.console import Console
from wisecli.config import BenchSettings, LoadOptions
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.wild import MAX_NEW_TOKENS, WILD, normalized, stop_tokens
from wisecli.models.loading import Loaded, load_model
from wisecli.models.running.generation import generate
from wisecli.progress import ignore_progress

# Of the weight that the methods have by default.
SHARES = (1.0, 0.1, 0.01, 0.001)
# UltraEdit's η.
RATES = (1.0, 0.5, 0.25, 0.1)
# AlphaEdit's threshold and λ, both in parts of the mean second moment.
THRESHOLDS, WEIGHTS = (0.02, 0.2, 2.0), (10.0, 1000.0)
# The share of curvature that CrispEdit closes: their script's default, their commands', their llama3-8b.yaml.
ENERGIES = (0.9, 0.8, 0.99)
# Demonstrations.
SHOTS = (1, 2, 4)
# Where pairs of them begin among the records that may be learnt from.
PAIRS = range(0, 16, 2)
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
RETRIEVERS: dict[str, Callable[[Bench], NearestFact]] = {"rag": Rag, "rag-hybrid": RagHybrid}


def lighter_ewc(bench: Bench, share: float) -> FtEwc:
    """FT-EWC with a share of its penalty."""
    made = FtEwc(bench)
    made.weight *= share
    return made


def variants() -> dict[str, Maker]:
    """The methods at every weight or step, by a name that says it."""
    ranges = {share: MemitSettings(weight=MemitSettings.weight * share) for share in SHARES}
    return {
        **{f"ft-ewc λ×{share:g}": partial(lighter_ewc, share=share) for share in SHARES},
        **{f"memit λ×{share:g}": partial(Memit, settings=own, batch=1) for share, own in ranges.items()},
        **{f"memit-mass λ×{share:g}": partial(Memit, settings=own) for share, own in ranges.items()},
        **{f"ultraedit η={rate:g}": partial(UltraEdit, settings=UltraEditSettings(rate=rate)) for rate in RATES},
        **{
            f"alphaedit θ={threshold:g} λ={weight:g}": partial(
                AlphaEdit, space=AlphaEditSettings(threshold=threshold, weight=weight), batch=100
            )
            for threshold in THRESHOLDS
            for weight in WEIGHTS
        },
        **{
            f"crispedit γ={energy:g}": partial(CrispEdit, settings=CrispEditSettings(energy=energy))
            for energy in ENERGIES
        },
        **{f"rag-shots ×{count}": partial(RagShots, count=count) for count in SHOTS},
        **{f"rag-pairs {first}": partial(RagShots, first=first) for first in PAIRS},
    }


def settings(options: Namespace) -> None:
    """Other settings of rivals; each variant is a method of `wise bench` by another name.

    Less weight on what FT-EWC, MEMIT and MEMIT-MASS are to keep, shorter steps of UltraEdit, other null spaces of
    AlphaEdit, other shares of curvature that CrispEdit closes, and more, fewer or other demonstrations of retrieval.
    Rows that are there already are not measured again.
    """
    load_methods()
    wanted = options.of.split(",")
    made = {name: maker for name, maker in variants().items() if name.split()[0] in wanted}
    for name, maker in made.items():
        METHODS.add(name, maker)
    AT_ONCE.update(name for name in made if name.split()[0] in AT_ONCE)
    protocol, console = options.protocol, Console()
    names, generated = ",".join(made), protocol != "teacher"
    bench_settings = BenchSettings(methods=names, counts=options.edits, protocol=protocol, generate=generated)
    with console.watching() as watch:
        report = run_bench(
            str(options.model),
            options.output,
            bench_settings,
            data=[options.data],
            train=options.train,
            load=LoadOptions(device=options.device),
            on_progress=watch,
        )
    print(markdown(report.rows))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")


def wordings(options: Namespace) -> None:
    """How retrieval should word a fact: answers to edits' prompts and rephrases behind the right fact.

    By WILD an answer counts if it is the target; to a bare prompt, where answers go on, if it begins with the target.
    """
    edits = [edit for edit in read_edits(options.data)[options.first : options.last] if edit.rephrases]
    loaded = load_model(options.model)
    stops, rows = stop_tokens(loaded.tokenizer), list[Row]()
    for name, wording in WORDINGS.items():
        wild, bare = wording.replace("{prompt}", WILD.text), wording.replace("{prompt}", "{}")
        counts = [*_right(loaded, edits, wild, stops), *_right(loaded, edits, bare, ())]
        columns = ("WILD", "WILD rephrased", "bare", "bare rephrased")
        rows.append({f"{len(edits)} edits": name, **dict(zip(columns, counts, strict=True))})
    show(rows, options)


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


def retrieval(options: Namespace) -> None:
    """How often retrieval finds the fact that a prompt asks for, without a model's answer to it: shares of prompts.

    Every prompt is asked in WILD's form. As taught and rephrased it should find its own edit, and an unrelated prompt
    none; what it finds is its own edit's fact, another edit's, or none that is similar enough.
    """
    edits, train = read_edits(options.data), read_edits(options.train)
    rows: list[Row] = []
    with TemporaryDirectory() as work:
        context = BenchContext(
            options.model, edits, (), train, BenchSettings(), LoadOptions(), Path(work), ignore_progress
        )
        for name in options.of.split(","):
            retriever = RETRIEVERS[name](context.bench)
            retriever.edit(edits)
            for kind, asked in _asked(edits).items():
                texts = (WILD.render(context.bench.loaded.tokenizer, prompt) for prompt, _ in asked)
                found = map(retriever.found, texts)
                counts = Counter(_owner(one, edit) for one, (_, edit) in zip(found, asked, strict=True))
                shares = {column: counts[column] / len(asked) for column in ("its own", "another's", "none")}
                rows.append({f"{len(edits)} edits": f"{name}, {kind}", **shares})
    show(rows, options)


def _asked(edits: Sequence[Edit]) -> dict[str, list[tuple[str, Edit]]]:
    """Prompts with the edit that each is of, by their kind; kinds that no edit has are left out."""
    kinds = {
        "as taught": [(edit.prompt, edit) for edit in edits],
        "rephrased": [(edit.rephrases[0], edit) for edit in edits if edit.rephrases],
        "unrelated": [(edit.locality[0].prompt, edit) for edit in edits if edit.locality],
    }
    return {kind: asked for kind, asked in kinds.items() if asked}


def _owner(found: Edit | None, edit: Edit) -> str:
    """Return the column of what was found for a prompt of an edit."""
    if found is None:
        return "none"
    return "its own" if (found.prompt, found.target) == (edit.prompt, edit.target) else "another's"


def _of_model(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)


def settings_options(parser: ArgumentParser) -> None:
    _of_model(parser)
    parser.add_argument("--edits", default="30", help="numbers of edits, with commas between")
    parser.add_argument("--of", default="ft-ewc,memit,memit-mass", help="methods, with commas between")
    parser.add_argument("--train", type=Path, help="records to learn from; without it those that are not edited")
    parser.add_argument("--protocol", default="teacher", choices=("teacher", "wild", "forms", "forms,wild"))
    parser.add_argument("-o", "--output", type=Path, default=Path("rivals"))
    parser.add_argument("--device", default="auto")


def wordings_options(parser: ArgumentParser) -> None:
    _of_model(parser)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--last", type=int, default=150)


def retrieval_options(parser: ArgumentParser) -> None:
    _of_model(parser)
    parser.add_argument("--train", type=Path, required=True, help="records that set the threshold of similarity")
    parser.add_argument("--of", default="rag", help=f"with commas between, of {', '.join(RETRIEVERS)}")


MEASURES = {
    "settings": (settings, settings_options),
    "wordings": (wordings, wordings_options),
    "retrieval": (retrieval, retrieval_options),
}

if __name__ == "__main__":
    run(__doc__, MEASURES)
