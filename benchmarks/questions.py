"""What edited models are asked: which prompts open an edit, and what is answered to them.

python benchmarks/questions.py asking memory z30.json --edits 30
python benchmarks/questions.py unfamiliar memory z30.json --edits 10
python benchmarks/questions.py near memory sample_edits/edits.jsonl
python benchmarks/questions.py forms memory zsre_3k.json --asked 25
python benchmarks/questions.py consequences --data ZsRE-test.json --model model --skip 100 --edits 40
python benchmarks/questions.py dates --model model --data zsre_3k.json
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opening import Prompts, shares
from runner import Measures, Row, answers, edited_by, run, show

from wisecli.config import EvalSettings, LoadOptions
from wisecli.edits.checks.admission import Admission
from wisecli.edits.record import Edit, parse_edit, read_edits
from wisecli.edits.text import unmarked
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.prompt_kinds import Fact, Kind, kinds

_LENGTH, _LENGTH_OF_DATES = 24, 16  # of answers, in tokens
_UNFAMILIAR, _NEAR = (Path(__file__).with_name(name) for name in ("unfamiliar.json", "near_questions.json"))
CONSEQUENCES = ("Subject_Aliasing", "Reasoning", "Logical_Generalization")


def of_kind(
    edited: EditedModel, kind: Kind, edits: Sequence[Edit], rng: random.Random, chats: Sequence[bool] = (False, True)
) -> Iterator[tuple[str, int]]:
    """Yield prompts of a kind around every edit, as it is taught or reworded: bare, in chat, or both."""
    for index, edit in enumerate(edits):
        reworded = edit.rephrases[0] if edit.rephrases and rng.random() < 0.5 else edit.prompt
        question = edit.prompt if edit.subject and edit.subject not in reworded else reworded
        second, other = edits[(index + 1) % len(edits)], edits[(index + 3) % len(edits)]
        also = Fact(second.prompt, second.subject, second.target)
        fact = Fact(question, edit.subject, edit.target, other.target, second=also)
        for chat in chats if edited.tokenizer.chat_template else (False,):
            text = kind.sample_prompt(edited.tokenizer, fact, trained=False, rng=rng, chat=chat)
            if text is not None:
                yield text, index


def asking(options: Namespace) -> None:
    """Share of prompts that open the edit they ask or mention, by how sure a prompt must be to ask it.

    Prompts are in all forms, and in the patterns of all kinds that nothing is learned from, bare and in chat; some that
    mention an edit stand in each form of text. Only the decision is looked at; `wise eval` has the answers.
    """
    edited = attach(options.memory, model=options.model, load=LoadOptions(device=options.device))
    edits = list(read_edits(options.records))[: options.edits]
    rows: list[Row] = []

    def add(name: str, group: str, prompts: Prompts) -> None:
        if prompts:
            rows.append({"prompts": name, "group": group, **shares(edited, prompts), "number": len(prompts)})

    everything: dict[str, Prompts] = {"as taught": [], "rephrased": [], "mentioned": []}
    for form in usable_forms(edited.tokenizer):
        reworded = [(form.render(edited.tokenizer, e.rephrases[0]), at) for at, e in enumerate(edits) if e.rephrases]
        everything["as taught"] += [(form.render(edited.tokenizer, edit.prompt), at) for at, edit in enumerate(edits)]
        everything["rephrased"] += reworded
        add(form.name, "rephrased", reworded)
    rng = random.Random(5)
    for kind in kinds().values():
        prompts = list(of_kind(edited, kind, edits, rng))
        everything["mentioned"] += [] if kind.asked else prompts
        add(kind.name, "asked" if kind.asked else "mentioned", prompts)
    mentions = [kind for kind in kinds().values() if not kind.asked]
    around = [form for form in usable_forms(edited.tokenizer) if form.surrounds]
    for number, form in enumerate(around):
        bare = [one for kind in mentions for one in of_kind(edited, kind, edits, rng, [False])][number :: len(around)]
        add(form.name, "mentioned", [(form.render(edited.tokenizer, text), index) for text, index in bare])
    for name, prompts in everything.items():
        add("all", name, prompts)
    show(rows, options, digits=2, width=110)


def unfamiliar(options: Namespace) -> None:
    """Share of prompts that open the edit they ask or mention, in a file of patterns whose writer knew of none here.
    Of the first, second and fourth file every second one has been looked at, from the first on; of the others none.
    """
    edited = attach(options.memory, model=options.model, load=LoadOptions(device=options.device))
    edits, rng = list(read_edits(options.records))[: options.edits], random.Random(5)
    rows: list[Row] = []
    for group, patterns in json.loads(options.patterns.read_text(encoding="utf-8")).items():
        own = [Kind(name, group == "asked", (), ((pattern,),)) for name, pattern in patterns.items()]
        for half, some in (("every second", own[::2]), ("the others", own[1::2])):
            prompts = [prompt for kind in some for prompt in of_kind(edited, kind, edits, rng)]
            rows.append({"prompts": group, "patterns": half, **shares(edited, prompts), "number": len(prompts)})
    show(rows, options, digits=2, width=110)


def near(options: Namespace) -> None:
    """Share of prompts in much the words of an edit's own question that open it, though they want another answer."""
    edited = attach(options.memory, model=options.model, load=LoadOptions(device=options.device))
    edits = list(read_edits(options.records))[: options.edits]
    known = json.loads(options.patterns.read_text(encoding="utf-8"))
    bare = [(text, index) for index, edit in enumerate(edits) for text in known[edit.id]]
    rows: list[Row] = []
    for form in usable_forms(edited.tokenizer):
        if form.name in ("bare", "chat"):
            prompts = [(form.render(edited.tokenizer, text), index) for text, index in bare]
            rows.append({"prompts": "near", "form": form.name, **shares(edited, prompts), "number": len(prompts)})
    show(rows, options, digits=2, width=110)


def forms(options: Namespace) -> None:
    """Answers in every form, and to questions beside the edits: the headline of `wise eval` alone.

    For memories of thousands of edits, of which the rest of `wise eval` would take long. The file may hold more records
    than the memory; other subjects are drawn from all of them.
    """
    from wisecli.cli.commands.evaluate import tell_evaluation
    from wisecli.cli.console import Console
    from wisecli.commands.measure.evaluate import EvalReport
    from wisecli.environment import peak_rss_bytes
    from wisecli.evaluation.memory_subject import MemorySubject
    from wisecli.evaluation.protocols import Generated, measure_generated
    from wisecli.progress import ignore_progress

    begun = time.perf_counter()
    edited = attach(options.memory, model=options.model, load=LoadOptions(device=options.device))
    edits = list(edited.manifest.edits)
    known = [*edits, *read_edits(options.records)]
    subject, asked = MemorySubject(edited, EvalSettings(), ignore_progress), Generated("forms", "all", options.edits)
    measured, _ = measure_generated(subject, asked, edits, known, max_new_tokens=_LENGTH)
    samples, seconds = {"edits": len(edits), **measured.samples}, time.perf_counter() - begun
    report = EvalReport("edits", {}, measured.before, samples, {}, seconds, peak_rss_bytes(), asked=measured.figures)
    tell_evaluation(Console(), report)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=1))


def following(record: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return what follows from a record of KnowEdit, by its kind: prompts with answers."""
    pairs = {}
    for kind, prompts in (record.get("portability") or {}).items():
        parsed = parse_edit({**record, "portability": {kind: prompts}}).portability
        pairs[kind] = [(one.prompt, one.answer) for one in parsed]
    return pairs


def stated(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with what follows from it stated."""
    pairs = [pair for own in following(record).values() for pair in own]
    return {**record, "also": [{"prompt": prompt, "target": answer} for prompt, answer in pairs]}


def right(answered: Sequence[str], targets: Sequence[str]) -> float:
    """Return the share of answers that are the target and nothing more."""
    equal = [unmarked(one) == unmarked(target) for one, target in zip(answered, targets, strict=True)]
    return sum(equal) / max(len(equal), 1)


def figures(edited: EditedModel, records: Sequence[Mapping[str, Any]], before: list[str]) -> dict[str, object]:
    """Return shares of right answers, and of unrelated prompts answered as ``before``, which is filled if empty."""
    edits, own = [parse_edit(record) for record in records], [following(record) for record in records]
    unrelated = [probe.prompt for edit in edits for probe in edit.locality[:1]]
    if not before:
        with edited.unedited():
            before += answers(edited, unrelated, _LENGTH)
    groups = {"edits": [(edit.prompt, edit.target) for edit in edits]}
    groups |= {kind: [pair for one in own for pair in one.get(kind, [])] for kind in CONSEQUENCES}
    groups["all that follows"] = [pair for kind in CONSEQUENCES for pair in groups[kind]]
    row: dict[str, object] = {}
    for name, pairs in groups.items():
        answered = answers(edited, [prompt for prompt, _ in pairs], _LENGTH)
        row[f"{name} ({len(pairs)})"] = right(answered, [answer for _, answer in pairs])
    same = sum(map(str.__eq__, before, answers(edited, unrelated, _LENGTH)))
    return {**row, "unrelated unchanged": same / max(len(before), 1)}


def consequences(options: Namespace) -> None:
    """Answers to questions that follow from edits, by their kind: as edits stand, by `--derive`, and stated as `also`.

    Answers are generated; one is right if it is the target and then ends.
    """
    records = json.loads(options.data.read_text(encoding="utf-8"))[options.skip : options.skip + options.edits]
    arms = {"edits alone": (records, False), "--derive": (records, True)}
    arms["stated as also"] = ([stated(record) for record in records], False)
    rows: list[Row] = []
    before: list[str] = []
    for name, (some, derive) in arms.items():
        with tempfile.TemporaryDirectory() as work:
            begun, admission = time.perf_counter(), Admission(on_conflict="keep", derive=derive)
            edited = edited_by(options.model, some, Path(work), options.device, admission)
            seconds = time.perf_counter() - begun
            if not rows:
                with edited.unedited():
                    rows.append({"": "unedited", **figures(edited, records, before)})
            follow = len(edited.manifest.edits) - len(records)
            own = {"": name, **figures(edited, records, before), "consequences": follow, "seconds": round(seconds)}
            rows.append(own)
    show(rows, options, digits=2)


def dates(options: Namespace) -> None:
    """Answers of edits whose targets begin with a digit, as dates do: bare, and with a blank behind the prompt.

    An answer is right, that of another edit of the same subject (records may contradict each other), the unedited
    model's own, or something else, which is the worst.
    """
    records = read_edits(options.data)[options.first : options.last]
    some = [edit.as_dict() for edit in records if edit.target.strip()[:1].isdigit() and edit.rephrases]
    with tempfile.TemporaryDirectory() as work:
        edited = edited_by(options.model, some, Path(work), options.device, Admission(on_conflict="latest"))
        edits = list(edited.manifest.edits)
        asked = {"as taught": [edit.prompt for edit in edits], "rephrased": [edit.rephrases[0] for edit in edits]}
        asked |= {f"{name} + blank": [f"{prompt} " for prompt in prompts] for name, prompts in asked.items()}
        show([{f"{len(edits)} edits": name, **outcomes(edited, edits, some)} for name, some in asked.items()], options)


def outcomes(edited: EditedModel, edits: Sequence[Edit], prompts: Sequence[str]) -> dict[str, int]:
    """Count what becomes of prompts, one an edit."""
    after = answers(edited, prompts, _LENGTH_OF_DATES)
    with edited.unedited():
        before = answers(edited, prompts, _LENGTH_OF_DATES)
    counts = Counter[str]()
    for edit, answer, own in zip(edits, after, before, strict=True):
        others = {other.target.strip() for other in edits if other.subject == edit.subject}
        if answer == edit.target.strip():
            counts["right"] += 1
        elif answer in others:
            counts["another edit's"] += 1
        else:
            counts["unedited" if answer == own else "other"] += 1
    return {name: counts[name] for name in ("right", "another edit's", "unedited", "other")}


def asking_options(parser: ArgumentParser, patterns: Path | None = None) -> None:
    """Options of measures that ask a memory, by patterns of a file where there is one."""
    parser.add_argument("memory", type=Path)
    parser.add_argument("records", type=Path, help="the edits that the memory holds, in their order")
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--edits", "--asked", type=int, default=40, help="so many of them are asked")
    if patterns is not None:
        parser.add_argument("--patterns", type=Path, default=patterns)


def model_options(parser: ArgumentParser, **numbers: int) -> None:
    """Options of measures that edit a model; the numbers say which records of the file they take."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)


MEASURES: Measures = {
    "asking": (asking, asking_options),
    "unfamiliar": (unfamiliar, partial(asking_options, patterns=_UNFAMILIAR)),
    "near": (near, partial(asking_options, patterns=_NEAR)),
    "forms": (forms, asking_options),
    "consequences": (consequences, partial(model_options, edits=40, skip=0)),
    "dates": (dates, partial(model_options, first=400, last=1400)),
}

if __name__ == "__main__":
    run(__doc__, MEASURES)
