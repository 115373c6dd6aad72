"""What ``wise edit`` did, or would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wisecli.edits.checks.admission import AdmissionReport
from wisecli.edits.record import Edit, consequences_in
from wisecli.environment import peak_vram_bytes
from wisecli.errors import GateFailedError

if TYPE_CHECKING:
    from wisecli.artifacts.shard_manifest import ShardDirectory, ShardEntry
    from wisecli.editing.run.resource_estimate import Plan


@dataclass(frozen=True)
class EditReport:
    """What ``wise edit`` did, or with a ``plan`` would do.

    ``edits`` counts those that were asked for, and ``consequences`` are what else was written as following from them.
    ``untaken`` names the edits of whose target some token is not the arg-max after the bare prompt, before merging:
    with what the gradient writer trained, or with the residuals that the closed form found. ``left_out`` names those
    for which the model gives nothing finite. ``missing`` counts the shards that other processes are to write.
    ``plan`` is what the run would take, if it was only planned.
    ``differing`` names the shards that are not those of the manifest that was to be reproduced, if one was.
    ``sifted`` is what was left out before training; if that was all, there are no edits and nothing was written.
    ``peak_vram_bytes`` is zero where no GPU took part. ``up_to_date`` says that the shards were there already.
    """

    output: Path
    edits: int
    shards: int
    layer: int
    module: str
    seconds: float
    peak_rss_bytes: int
    untaken: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    missing: int = 0
    plan: Plan | None = None
    differing: tuple[str, ...] | None = None
    sifted: AdmissionReport = field(default_factory=AdmissionReport)
    peak_vram_bytes: int = field(default_factory=peak_vram_bytes)
    up_to_date: bool = False
    consequences: tuple[Edit, ...] = ()

    @property
    def planned(self) -> bool:
        """Whether nothing was done."""
        return self.plan is not None

    @property
    def seconds_per_edit(self) -> float:
        """Whole running time, loading included, over the edits and their consequences."""
        return self.seconds / max(1, self.edits + len(self.consequences))

    @classmethod
    def of_shards(
        cls, output: Path, shards: ShardDirectory, *, peak_rss_bytes: int, up_to_date: bool = False
    ) -> EditReport:
        """Return the report on shards that were there already."""
        counts, place = (len(shards.edits), len(shards.shards)), (shards.site.layer, shards.site.module)
        missed = untaken(shards.shards), shards.left_out
        report = cls(output, *counts, *place, 0.0, peak_rss_bytes, *missed, up_to_date=up_to_date)
        return report.with_consequences_apart(shards.edits)

    def with_consequences_apart(self, edits: Sequence[Edit]) -> EditReport:
        """Return the same report with the consequences among what was written counted apart."""
        consequences = consequences_in(edits)
        return replace(self, edits=len(edits) - len(consequences), consequences=consequences)

    def check(self) -> None:
        """Check that what was planned fits into memory, and that no others came out than the shards to be reproduced.

        Raises:
            GateFailedError: saying what it needs, or naming them.
        """
        if self.plan is not None and self.plan.budget is not None and not self.plan.fits:
            needed, there = self.plan.peak / 2**30, self.plan.budget / 2**30
            most = f"at its most it needs {needed:.2f} GiB, and there are {there:.2f}"
            raise GateFailedError(f"this does not fit: {most}; {self.plan.remedy}")
        if self.differing:
            raise GateFailedError(f"{self.output}: {', '.join(self.differing)} differ from those of the manifest")


def untaken(entries: Sequence[ShardEntry]) -> tuple[str, ...]:
    """Return the ids of edits of some shards of whose target some token is not the arg-max."""
    return tuple(name for entry in entries for name in entry.untaken)
