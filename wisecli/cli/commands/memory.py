"""Commands on a memory that is edited again and again. Parse, call one library function, print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wisecli.cli import options as shared
from wisecli.cli.console import Console, Table, count, sifted_json, sifted_lines
from wisecli.cli.edit_lines import consequence_lines, consequences_cell, edit_line, moved, release_line, short
from wisecli.cli.parameters import ANSWERS, OUTPUT, flag, option
from wisecli.edits.text import edits_with

if TYPE_CHECKING:
    from wisecli.commands.checkpoint.explain import ExplainReport
    from wisecli.commands.edit.edit_into import IntoReport
    from wisecli.commands.memory.diff import DiffReport
    from wisecli.commands.memory.log import LogReport
    from wisecli.commands.memory.remove import RemoveReport
    from wisecli.commands.memory.rollback import RollbackReport
    from wisecli.memory.history.release_log import Release
    from wisecli.memory.history.releases import Published

MemoryWithHistory = Annotated[Path, typer.Argument(help="A memory with a history, as `wise merge` makes it.")]


def remove(
    memory: MemoryWithHistory,
    ids: Annotated[list[str], typer.Argument(help="Ids of the edits to take out.")],
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    model: shared.Model = None,
    reason: shared.Reason = "",
    who: shared.Who = None,
    sign: shared.Sign = None,
    dtype: shared.Dtype = "auto",
    trust_remote_code: shared.Trust = False,
    quiet: shared.Quiet = False,
) -> None:
    """Take edits out of a memory, as if they had never been in it."""
    console = Console(as_json, quiet)
    from wisecli.commands.memory.remove import remove as run

    with console.watching() as on_progress:
        report = run(
            memory,
            ids,
            model=model,
            provenance=shared.provenance_of(who, reason, shared.key_in(sign)),
            load=shared.load_options(device, dtype, trust_remote_code),
            on_progress=on_progress,
        )
    ReportPrinter(console).removed(report)


def rollback(
    memory: MemoryWithHistory,
    to: Annotated[str, option("Number of a release, or a date or time, as 2026-11-01.", "--to", metavar="WHEN")],
    model: shared.Model = None,
    reason: shared.Reason = "",
    who: shared.Who = None,
    sign: shared.Sign = None,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Make a memory what it was at an earlier release; the releases since stay in its history."""
    console = Console(as_json, quiet)
    from wisecli.commands.memory.rollback import rollback as run

    provenance = shared.provenance_of(who, reason, shared.key_in(sign))
    with console.watching() as on_progress:
        report = run(memory, to, model=model, provenance=provenance, on_progress=on_progress)
    ReportPrinter(console).rolled_back(report)


def log(
    memory: MemoryWithHistory,
    edit: Annotated[str | None, option("Only what touched the edit with this id.", "--edit", metavar="ID")] = None,
    verify_signature: shared.SealSignature = None,
    signer: shared.Signer = None,
    signer_identity: shared.Identity = None,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """List what was done to a memory, when and by whom, after checking that all of it is as it was written."""
    from wisecli.commands.memory.log import log as run

    signed = shared.signed_by(verify_signature, signer, signer_identity)
    ReportPrinter(Console(as_json, quiet)).logged(run(memory, edit=edit, signed=signed), of_one=edit is not None)


def diff(
    first: Annotated[str, typer.Argument(help="Memory, checkpoint or shards; memory@3 for a release.")],
    second: Annotated[str, typer.Argument(help="What to compare it with.")],
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Say which edits and settings two memories, exported checkpoints or releases do not share."""
    from wisecli.commands.memory.diff import diff as run

    ReportPrinter(Console(as_json, quiet)).compared(run(first, second))


def explain(
    model: Annotated[str, typer.Argument(help="Exported directory, or base model (with --memory).")],
    prompt: Annotated[str, typer.Argument(help="The prompt to look at.")],
    memory: shared.Memory = None,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    nearest: Annotated[
        int,
        option("How many memories, or edits, are made to answer.", panel=ANSWERS, default="3", metavar="N", minimum=0),
    ] = 3,
    max_new_tokens: Annotated[
        int, option("Length of an answer at most.", panel=ANSWERS, default="32", metavar="N", minimum=1)
    ] = 32,
    chat: Annotated[bool, flag("Ask in the chat template.", "--chat", panel=ANSWERS)] = False,
    dtype: shared.Dtype = "auto",
    memory_budget: shared.Budget = None,
    trust_remote_code: shared.Trust = False,
    plot: Annotated[
        Path | None, option("Draw the scores of all tokens into this file.", "--plot", panel=OUTPUT, metavar="FILE")
    ] = None,
    quiet: shared.Quiet = False,
) -> None:
    """Say why a prompt is answered as it is: nearest edits, scores by token, and what each memory would answer."""
    console = Console(as_json, quiet)
    from wisecli.artifacts.directory_kind import locate_memory
    from wisecli.commands.checkpoint.explain import explain as run

    directory, base = locate_memory(model, memory, Path("memory"))
    load = shared.load_options(device, dtype, trust_remote_code, memory_budget)
    with console.watching():
        report = run(
            directory,
            prompt,
            model=base,
            nearest=nearest,
            max_new_tokens=max_new_tokens,
            chat=chat,
            plot=plot,
            load=load,
        )
    ReportPrinter(console).explained(report)


_UNBOUND = (
    "; an older version took no digest of the manifest: `wise merge --into` without shards makes a release that has"
)


@dataclass(frozen=True)
class ReportPrinter:
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
        followed = edited.consequences
        report_line = release_line(release, str(report.memory), report.held, {edit.id for edit in followed})
        lines = [f"{report_line} ({report.seconds:.1f} s)"]
        lines += [f"{len(report.known)} were held already"] if report.known else []
        lines += consequence_lines(followed)
        lines += [f"modified: {name}" for name in release.modified]
        lines += [f"superseded: {old} by {new}" for old, new in release.superseded.items()]
        lines += sifted_lines(report.sifted)
        lines += [f"did not take: {name}" for name in edited.untaken]
        lines += [f"left out, as the model gives nothing finite: {name}" for name in edited.left_out]
        more |= {"untaken": list(edited.untaken), "left_out": list(edited.left_out)}
        self._tell(report, lines, more | {"consequences": [edit.as_dict() for edit in followed]})

    def joined(self, memory: str, published: Published) -> None:
        """Print what merging into a memory did."""
        release, held = published.release, published.held
        results = {"memory": memory, "held": held, "release": asdict(release), "up_to_date": published.up_to_date}
        content = {"results": results}
        if published.up_to_date:
            self.console.result(content, f"release {release.number} of {memory}/: up to date, {held} held")
            return
        self.console.result(content, release_line(release, memory, held))

    def removed(self, report: RemoveReport) -> None:
        """Print what was taken out."""
        release = report.release
        followed = list(report.consequences)
        out = edits_with(len(release.removed) - len(followed), len(followed))
        lines = [f"release {release.number} of {report.memory}/: {out} out, {report.held} held"]
        lines += [f"out as a consequence: {name}" for name in followed]
        lines += [f"trained anew: {name}" for name in report.rewritten]
        self._tell(report, lines, {"rewritten": list(report.rewritten), "consequences": followed})

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
        followed = report.consequences
        more = ("consequences",) if followed else ()
        table = Table(("release", "when", "who", "action", "in", "modified", "out", *more, "why"), str(report.memory))
        for release in report.releases:
            of_edits = moved(release, lambda name: name not in followed)
            cells = [str(number or "") for number in of_edits]
            cells += [consequences_cell(release, followed)] if followed else []
            table.add(str(release.number), release.when[:19], release.who, release.action, *cells, release.reason)
        lines = [f"held since release {number}: {edit_line(edit)}" for edit, number in report.edits] if of_one else []
        if not of_one:
            whole = ", and every file is as it was written" if report.bound else _UNBOUND
            apart_held = sum(edit.consequence_of is not None for edit, _ in report.edits)
            lines = [f"{edits_with(len(report.edits) - apart_held, apart_held)} held; the log is whole{whole}"]
        self.console.result(report.as_json(), table, *lines)

    def explained(self, report: ExplainReport) -> None:
        """Print a prompt's answers, the edits it is near to, and what was open at every token."""
        columns = ["nearest", "its prompt", "its target", "score / threshold", "answer if it answers"]
        by_name = any(edit.named is not None for edit in report.nearest)
        by_request = any(edit.asked is not None for edit in report.nearest)
        by_question = any(edit.fits is False for edit in report.nearest)
        columns += ["subject named"] * by_name + ["question fits"] * by_question
        columns += ["asked, not only mentioned"] * by_request
        nearest = Table(columns)
        for edit in report.nearest:
            texts = short(edit.prompt or ""), short(edit.target or ""), f"{edit.strength:.2f}", short(edit.answer)
            named = [{True: "yes", False: "no", None: "need not be"}[edit.named]] * by_name
            fits = [{True: "yes", False: "no", None: ""}[edit.fits]] * by_question
            asked = ["" if edit.asked is None else f"{edit.asked:.2f}"] * by_request
            nearest.add(edit.name, *texts, *named, *fits, *asked)
        tokens = Table(("token", "score / threshold", "answered by", "nearest edit"))
        for index, token in enumerate((*report.prompt_tokens, *report.answer_tokens)):
            if index == len(report.prompt_tokens):
                tokens.part()
            by = "side memory" if token.routed else "main memory"
            tokens.add(repr(token.text), f"{token.strength:.2f}", by, token.edit or "")
        lines = [f"edited: {short(report.answer)}", f"unedited: {short(report.unedited)}", report.reason]
        self.console.result(report.as_json(), *lines, *([nearest] if report.nearest else []), tokens)

    def compared(self, report: DiffReport) -> None:
        """Print what differs, one line each."""
        lines = [f"- {edit_line(edit)}" for edit in report.removed]
        lines += [f"+ {edit_line(edit)}" for edit in report.added]
        for before, after in report.changed:
            lines += [f"- {edit_line(before)}", f"+ {edit_line(after)}"]
        lines += [f"{name}: {before} → {after}" for name, (before, after) in report.settings.items()]
        self.console.result(report.as_json(), *(lines or ["no difference"]))

    def _tell(self, report: Any, lines: list[str], more: Mapping[str, Any]) -> None:
        release: Release | None = report.release
        results = {"memory": str(report.memory), "held": report.held, "seconds": report.seconds, **more}
        results["release"] = None if release is None else asdict(release)
        self.console.result({"results": results}, *lines)
