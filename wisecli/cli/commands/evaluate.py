"""Figures, and what they are taken on: eval, bench, fetch. Parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wisecli.cli import options as shared
from wisecli.cli.choices import DATASETS, MODELS, one_of
from wisecli.cli.console import Console, Table, count, note
from wisecli.cli.ineffective_flags import of_evaluation
from wisecli.cli.parameters import INPUT, MEASURED, flag, option, setting
from wisecli.cli.setting_options import set_of, settings_in
from wisecli.cli.unknown_settings import unknown_names
from wisecli.config import EvalSettings, resolve

if TYPE_CHECKING:
    from wisecli.commands.measure.evaluate import EvalReport


_measured = partial(setting, EvalSettings, panel=MEASURED)
_KINDS = {
    "as_taught": "as taught",
    "rephrased": "rephrased",
    "portability_answered": "portability",
    "unrelated_unchanged": "unrelated unchanged",
}
_MEANS = {"": "mean", "_trained": "mean, trained", "_unseen": "mean, never trained"}
# What is asked in other ways, and what mentions an edit, as their titles and columns.
_AROUND = {
    True: ("asked in other ways", (("asked", "gets the edit's answer"),)),
    False: (
        "only mentioned",
        (("mentioned", "gets the edit's answer (less is better)"), ("mentioned_unchanged", "as before, word for word")),
    ),
}
_BESIDE = {"other_question": "other questions on the subjects", "other_subject": "questions on other subjects"}


def evaluate(
    directory: Annotated[str | None, typer.Argument(help="Exported directory, or base model.")] = None,
    memory: shared.Memory = None,
    dataset: Annotated[
        str | None,
        setting(
            EvalSettings,
            "dataset",
            "A benchmark (zsre, counterfact, wikibigedit) or a file.",
            none="the memory's own edits",
            complete=one_of(DATASETS),
        ),
    ] = None,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    model: shared.Model = None,
    data: Annotated[
        Path | None, option("The dataset's file, instead of fetching it.", panel=INPUT, metavar="FILE")
    ] = None,
    edits: Annotated[
        int | None,
        setting(EvalSettings, "edits", "Only the first so many records.", panel=INPUT, none="those the memory holds"),
    ] = None,
    config: shared.Config = None,
    protocol: Annotated[str | None, shared.protocol_of(EvalSettings)] = None,
    forms: Annotated[str | None, shared.forms_of(EvalSettings)] = None,
    kinds: Annotated[str | None, shared.kinds_of(EvalSettings)] = None,
    ask: Annotated[int | None, shared.ask_of(EvalSettings)] = None,
    chat: Annotated[bool | None, _measured("chat", "Ask in the chat template.", "--chat/--no-chat")] = None,
    generate: Annotated[
        bool | None, _measured("generate", "Also generate answers.", "--generate/--no-generate")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        _measured("max_new_tokens", "Length of generated answers.", none="the longest target and a little more"),
    ] = None,
    fail_under: Annotated[
        str | None, option("Exit with 1 below these, as as_taught=.9,other_subject=.02.", panel=MEASURED)
    ] = None,
    if_measured: Annotated[
        bool, flag("Of --fail-under pass over what no record measures.", "--if-measured", panel=MEASURED)
    ] = False,
    set_: Annotated[list[str] | None, set_of("eval", MEASURED)] = None,
    dtype: shared.Dtype = "auto",
    memory_budget: shared.Budget = None,
    trust_remote_code: shared.Trust = False,
    quiet: shared.Quiet = False,
) -> None:
    """Measure what an edited model answers in the forms that people ask in, and how it got there, before and after."""
    by_set = settings_in("eval", set_)
    given = {**locals(), **by_set}
    ineffective, console = of_evaluation(given), Console(as_json, quiet)
    gates = shared.thresholds_in(fail_under)
    settings = resolve(EvalSettings, given, section="eval", file=config)
    console.warn([*ineffective, *unknown_names(config)])
    load = shared.load_options(device, dtype, trust_remote_code, memory_budget)
    from wisecli.artifacts.directory_kind import locate_memory
    from wisecli.commands.measure.evaluate import evaluate as run
    from wisecli.evaluation.metrics import require_figures

    require_figures(gates)
    path, base = locate_memory(directory, memory, Path("memory"))
    with console.watching() as on_progress:
        report = run(path, settings, model=model or base, data=data, load=load, on_progress=on_progress)
    tell_evaluation(console, report)
    passed_over = report.check(gates, if_measured=if_measured)
    if passed_over:
        note(f"no record measures {', '.join(passed_over)}, so --fail-under passed over it")


def fetch(
    name: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, zsre, counterfact or wikibigedit.", autocompletion=one_of((*MODELS, *DATASETS))
        ),
    ],
    output: Annotated[
        Path | None, option("Where to put it.", "-o", "--output", default="the user cache", metavar="PATH")
    ] = None,
    force: shared.Force = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Fetch the small model to try things on, or benchmark data."""
    console = Console(as_json, quiet)
    from wisecli.commands.measure.fetch import fetch as run

    with console.watching() as on_progress:
        path = run(name, output, force=force, on_progress=on_progress)
    console.result({"results": {"output": str(path)}}, str(path))


def tell_evaluation(console: Console, report: EvalReport) -> None:
    """Print what ``wise eval`` measured: generated answers, then teacher-forced figures."""
    right = "before", "after"
    edits = count(report.samples["edits"], "edit")
    title = f"diagnosis, teacher-forced: {report.dataset}, {edits}" if report.asked else f"{report.dataset}: {edits}"
    table = Table(("measure", *right), title, right)
    for name, after in report.after.items():
        table.add(name, f"{report.before[name]:.3f}", f"{after:.3f}")
    console.result(report.as_json(), *_generated(report, edits), *([table] if table.rows else []))


def _generated(report: EvalReport, edits: str) -> list[Table | str]:
    """Return the headline figures: answers by WILD, or in forms, with what should not get an edit's answer."""
    if "wild_as_taught" in report.asked:
        return [_wild(report, edits)]
    tables: list[Table | str] = _in_kinds(report, edits)
    if "as_taught" not in report.asked:
        return tables
    return [_in_forms(report, edits), *tables, *_beside(report)]


def _wild(report: EvalReport, edits: str) -> Table:
    right = "before", "after"
    table = Table(("measure", *right), f"{report.dataset}: {edits}, asked as in WILD (arXiv 2502.11177)", right)
    for name, after in report.asked.items():
        before = report.before.get(name)
        table.add(name, "" if before is None else f"{before:.3f}", f"{after:.3f}")
    return table


def _in_forms(report: EvalReport, edits: str) -> Table:
    """Return a row for each form, with a star if nothing is learned in it, and means."""
    from wisecli.models.prompts.prompt_forms import forms

    kinds = [(kind, head) for kind, head in _KINDS.items() if kind in report.asked]
    heads = [head for _, head in kinds]
    title = f"{report.dataset}: answers to {report.samples['asked']} of {edits} (* never trained in this form)"
    table = Table(("form", *heads), title, heads)
    for form in forms().values():
        if f"as_taught/{form.label}" in report.asked:
            star = "" if form.trained else " *"
            table.add(form.name + star, *(_share(report.asked, f"{kind}/{form.label}") for kind, _ in kinds))
    table.part()
    for suffix, name in _MEANS.items():
        if f"as_taught{suffix}" in report.asked:
            table.add(name, *(_share(report.asked, kind + suffix) for kind, _ in kinds))
    return table


def _in_kinds(report: EvalReport, edits: str) -> list[Table | str]:
    """Return a table of what asks an edit in other ways, and one of what mentions it, with a row for each kind, and
    means.
    """
    from wisecli.models.prompts.prompt_kinds import kinds

    tables: list[Table | str] = []
    for asked, (title, figures) in _AROUND.items():
        heads = [head for _, head in figures]
        first = figures[0][0]
        if first not in report.asked:
            continue
        table = Table(("kind", *heads), f"{title}, {report.samples['asked']} of {edits}", heads)
        for kind in kinds().values():
            if kind.asked == asked and f"{first}/{kind.label}" in report.asked:
                table.add(kind.name, *(_share(report.asked, f"{name}/{kind.label}") for name, _ in figures))
        table.part()
        table.add("mean", *(_share(report.asked, name) for name, _ in figures))
        tables.append(table)
    return tables


def _beside(report: EvalReport) -> list[str]:
    """Return lines on specificity, and on questions with several answers."""
    shares = [
        f"{_share(report.asked, name)} of {report.samples[name]} {words}"
        for name, words in _BESIDE.items()
        if name in report.asked
    ]
    lines = [f"specificity, share that gets the edit's answer: {'; '.join(shares)}"] if shares else []
    if left := report.samples["without_subject"]:
        lines.append(f"specificity leaves out {count(left, 'edit')} whose prompt names no subject")
    if contradictory := report.samples["contradictory"]:
        share = _share(report.asked, "rephrased_unique") or "none"
        lines.append(
            f"rephrased, without {count(contradictory, 'question')} that other records answer otherwise: {share}"
        )
    return lines


def _share(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.3f}" if name in figures else ""
