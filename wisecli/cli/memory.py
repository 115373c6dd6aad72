"""Commands on a memory that is edited again and again. Parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli.console import Console, Table, count, sifted_json, sifted_lines
from wisecli.cli.options import AsJson, Budget, Device, Dtype, Memory, Model, Quiet, Reason, Trust, Who, load_options
from wisecli.cli.parameters import ANSWERS, OUTPUT, flag, option

if TYPE_CHECKING:
    from wisecli.commands.diff import DiffReport
    from wisecli.commands.edit_into import IntoReport
    from wisecli.commands.explain import ExplainReport
    from wisecli.commands.log import LogReport
    from wisecli.commands.remove import RemoveReport
    from wisecli.commands.rollback import RollbackReport
    from wisecli.edits.record import Edit
    from wisecli.memory.history import Release
    from wisecli.memory.releases import Published

Place = Annotated[Path, typer.Argument(help="A memory with a history, as `wise edit --into` makes it.")]


def remove(
    memory: Place,
    ids: Annotated[list[str], typer.Argument(help="Ids of the edits to take out.")],
    model: Model = None,
    reason: Reason = "",
    who: Who = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Take edits out of a memory, as if they had never been in it."""
    console = Console(as_json, quiet)
    from wisecli.commands.remove import remove as run
    from wisecli.memory.history import Provenance

    with console.watching() as watch:
        report = run(
            memory,
            ids,
            model=model,
            provenance=Provenance(who, reason),
            load=load_options(device, dtype, trust_remote_code),
            watch=watch,
        )
    Told(console).removed(report)


def rollback(
    memory: Place,
    to: Annotated[str, option("Number of a release, or a date or time, as 2026-11-01.", "--to", metavar="WHEN")],
    model: Model = None,
    reason: Reason = "",
    who: Who = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a memory what it was at an earlier release; the releases since stay in its history."""
    console = Console(as_json, quiet)
    from wisecli.commands.rollback import rollback as run
    from wisecli.memory.history import Provenance

    with console.watching() as watch:
        report = run(memory, to, model=model, provenance=Provenance(who, reason), watch=watch)
    Told(console).rolled_back(report)


def log(
    memory: Place,
    edit: Annotated[str | None, option("Only what touched the edit with this id.", "--edit", metavar="ID")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List what was done to a memory, when and by whom, after checking that its log is whole."""
    from wisecli.commands.log import log as run

    Told(Console(as_json, quiet)).logged(run(memory, edit=edit), of_one=edit is not None)


def diff(
    first: Annotated[str, typer.Argument(help="Memory, checkpoint or shards; memory@3 for a release.")],
    second: Annotated[str, typer.Argument(help="What to compare it with.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say which edits and settings two memories, exported checkpoints or releases do not share."""
    from wisecli.commands.diff import diff as run

    Told(Console(as_json, quiet)).compared(run(first, second))


def explain(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompt: Annotated[str, typer.Argument(help="The prompt to look at.")],
    memory: Memory = None,
    device: Device = "auto",
    as_json: AsJson = False,
    nearest: Annotated[
        int,
        option("How many memories, or edits, are made to answer.", panel=ANSWERS, default="3", metavar="N", least=0),
    ] = 3,
    max_new_tokens: Annotated[
        int, option("Length of an answer at most.", panel=ANSWERS, default="32", metavar="N", least=1)
    ] = 32,
    chat: Annotated[bool, flag("Ask in the chat template.", "--chat", panel=ANSWERS)] = False,
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    trust_remote_code: Trust = False,
    plot: Annotated[
        Path | None,
        option("Draw the scores of all tokens into this file.", "--plot", panel=OUTPUT, metavar="FILE"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Say why a prompt is answered as it is: nearest edits, scores by token, and what each memory would answer."""
    console = Console(as_json, quiet)
    from wisecli.artifacts.locate import locate_memory
    from wisecli.commands.explain import explain as run

    place, base = locate_memory(model, memory, Path("memory"))
    load = load_options(device, dtype, trust_remote_code, memory_budget)
    with console.watching():
        report = run(
            place,
            prompt,
            model=base,
            nearest=nearest,
            max_new_tokens=max_new_tokens,
            chat=chat,
            plot=plot,
            load=load,
        )
    Told(console).explained(report)


_LONGEST = 48


@dataclass(frozen=True)
class Told:
    """Prints reports through a console."""

    console: Console

    def landed(self, report: IntoReport) -> None:
        """Print what a batch of edits did to a memory."""
        release, edited = report.release, report.edited
        more: dict[str, Any] = {"known": list(report.known), "sifted": sifted_json(report.sifted)}
        if edited is None or release is None:
            what = f"release {release.number} of {report.memory}/ stays as it is" if release else "no memory was made"
            held = f", {len(report.known)} were held already" if report.known else ""
            lines = [f"{what}: there is nothing to train{held}", *sifted_lines(report.sifted)]
            self._tell(report, lines, more)
            return
        lines = [
            f"release {release.number} of {report.memory}/: {count(len(release.added), 'edit')} in, {report.held} held "
            f"({report.seconds:.1f} s)"
        ]
        lines += [f"{len(report.known)} were held already"] if report.known else []
        lines += [f"superseded: {old} by {new}" for old, new in release.superseded.items()]
        lines += sifted_lines(report.sifted)
        lines += [f"did not take: {name}" for name in edited.untaken]
        lines += [f"left out, as the model gives nothing finite: {name}" for name in edited.left_out]
        self._tell(report, lines, {"untaken": list(edited.untaken), "left_out": list(edited.left_out)} | more)

    def joined(self, memory: str, published: Published) -> None:
        """Print what merging into a memory did."""
        release, held = published.release, len(published.manifest.edits)
        content = {"results": {"memory": memory, "held": held, "release": asdict(release)}}
        what = f"release {release.number} of {memory}/: {count(len(release.added), 'edit')} in, {held} held"
        self.console.result(content, what)

    def removed(self, report: RemoveReport) -> None:
        """Print what was taken out."""
        release = report.release
        out = count(len(release.removed), "edit")
        lines = [f"release {release.number} of {report.memory}/: {out} out, {report.held} held"]
        lines += [f"trained anew: {name}" for name in report.rewritten]
        self._tell(report, lines, {"rewritten": list(report.rewritten)})

    def rolled_back(self, report: RollbackReport) -> None:
        """Print what a memory became again."""
        target, release = report.target, report.release
        how = "the same to the byte" if report.same else "not the same to the byte"
        lines = [
            f"release {release.number} of {report.memory}/ is release {target.number} of {target.when[:19]}: "
            f"{count(report.held, 'edit')} held, {how}"
        ]
        self._tell(report, lines, {"target": asdict(target), "same": report.same})

    def logged(self, report: LogReport, *, of_one: bool) -> None:
        """Print releases; of one edit also what it is now."""
        table = Table(("release", "when", "who", "action", "in", "out", "why"), str(report.memory))
        for release in report.releases:
            out = len(release.removed) + len(release.superseded)
            numbers = str(len(release.added) or ""), str(out or "")
            table.add(str(release.number), release.when[:19], release.who, release.action, *numbers, release.reason)
        lines = [f"held since release {number}: {_shown(edit)}" for edit, number in report.edits] if of_one else []
        if not of_one:
            lines = [f"{count(len(report.edits), 'edit')} held; the log is whole"]
        self.console.result(report.as_json(), table, *lines)

    def explained(self, report: ExplainReport) -> None:
        """Print a prompt's answers, the edits it is near to, and what was open at every token."""
        asked = any(one.named is not None for one in report.nearest)
        columns = "nearest", "its prompt", "its target", "score / threshold", "answer if it answers"
        near = Table((*columns, "subject named") if asked else columns)
        for one in report.nearest:
            texts = _short(one.prompt or ""), _short(one.target or ""), f"{one.strength:.2f}", _short(one.answer)
            named = [{True: "yes", False: "no", None: "need not be"}[one.named]] if asked else []
            near.add(one.name, *texts, *named)
        tokens = Table(("token", "score / threshold", "answered by", "nearest edit"))
        for place, token in enumerate((*report.prompt_tokens, *report.answer_tokens)):
            if place == len(report.prompt_tokens):
                tokens.part()
            by = "side memory" if token.routed else "main memory"
            tokens.add(repr(token.text), f"{token.strength:.2f}", by, token.edit or "")
        lines = [f"edited: {_short(report.answer)}", f"unedited: {_short(report.unedited)}"]
        self.console.result(report.as_json(), *lines, near, tokens)

    def compared(self, report: DiffReport) -> None:
        """Print what differs, one line each."""
        lines = [f"- {_shown(edit)}" for edit in report.removed]
        lines += [f"+ {_shown(edit)}" for edit in report.added]
        for before, after in report.changed:
            lines += [f"- {_shown(before)}", f"+ {_shown(after)}"]
        lines += [f"{name}: {before} → {after}" for name, (before, after) in report.settings.items()]
        self.console.result(report.as_json(), *(lines or ["no difference"]))

    def _tell(self, report: Any, lines: list[str], more: Mapping[str, Any]) -> None:
        release: Release | None = report.release
        results = {"memory": str(report.memory), "held": report.held, "seconds": report.seconds, **more}
        results["release"] = None if release is None else asdict(release)
        self.console.result({"results": results}, *lines)


def _shown(edit: Edit) -> str:
    return f"{edit.id}: {_short(edit.prompt)} → {_short(edit.target)}"


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"
