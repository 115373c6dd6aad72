"""What studies work with: the edits, and the shards, memories and figures that the package's own commands make."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jsonlines

from wisecli.commands.edit.edit import edit
from wisecli.commands.edit.run_options import RunOptions
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import BenchSettings, EditSettings, EvalSettings, LoadOptions, MergeSettings, resolve
from wisecli.edits.checks.admission import NO_CHECKS
from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.io.digest import sha256_json
from wisecli.models.loading import pick_device
from wisecli.progress import ProgressCallback

_FEWEST_SHARDS = 4

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class StudyContext:
    """What a study may use.

    ``counts`` are the numbers of edits asked for, the first of ``tested`` each; ``load`` says where and how the model
    is loaded; rows share the shards in ``work``.
    """

    directory: Path
    tested: Sequence[Edit]
    counts: Sequence[int]
    settings: BenchSettings
    load: LoadOptions
    work: Path
    on_progress: ProgressCallback

    @property
    def device(self) -> str:
        """The kind of device that is measured on."""
        return pick_device(self.load.device).type

    def several(self, count: int) -> int:
        """Return how many shards hold ``count`` edits where there are to be several: as ``edits_per_shard`` says.

        By default as in editing, but about four at least.
        """
        usual = min(resolve(EditSettings, {}, section="edit").edits_per_shard, math.ceil(count / _FEWEST_SHARDS))
        return math.ceil(count / (self.settings.edits_per_shard or usual))

    def shards(
        self,
        count: int,
        *,
        shards: int | None = None,
        layer: str | None = None,
        mask_ratio: float | None = None,
        writer: str | None = None,
        mode: str = "lookup",
    ) -> Path:
        """Return shards of the first edits, written when they are first asked for; by default as `wise edit` writes.

        Args:
            mode: what is to be made of them, as of `wise merge`; shards for a matrix also make a lookup.
        """
        site = None if mode == "lookup" else "matrix"
        flags = {"shards": shards, "layer": layer, "mask_ratio": mask_ratio, "writer": writer, "site": site}
        settings = resolve(EditSettings, {**flags, "seed": self.settings.seed}, section="edit")
        records = [record.as_dict() for record in self.tested[:count]]
        about = [str(self.directory), self.load.dtype, asdict(settings), records]
        directory = self.work / f"shards-{count}-{sha256_json(about)[:12]}"
        if not directory.exists():
            # What a version of other packages has begun there is begun anew.
            edit(
                str(self.directory),
                self._file(count),
                directory,
                settings,
                load=self.load,
                options=RunOptions(force=True),
                admission=NO_CHECKS,
                on_progress=self.on_progress,
            )
        return directory

    def memory(
        self, shards: Path, *, mode: str | None = None, method: str | None = None, refit: bool | None = None
    ) -> Path:
        """Return a memory of shards, by default as `wise merge` makes it; it takes the place of the last one."""
        flags = {"mode": mode, "method": method, "refit": refit, "seed": self.settings.seed}
        settings = resolve(MergeSettings, flags, section="merge")
        merge([shards], self.work / "memory", settings, force=True, on_progress=self.on_progress)
        return self.work / "memory"

    def attached(self, memory: Path) -> EditedModel:
        """Return the model with a memory in place."""
        return attach(memory, load=self.load)

    def figures(self, memory: Path, count: int, *, oracle: bool = False) -> dict[str, Any]:
        """Return what `wise eval` measures of the first edits, with teacher forcing.

        Args:
            oracle: whether the memory that holds an edit answers, whatever the router says.
        """
        given = EvalSettings(generate=False, batch_size=self.settings.batch_size)
        file = self._file(count)
        report = evaluate(memory, given, data=file, load=self.load, oracle=oracle, on_progress=self.on_progress)
        return {**report.after, "before": report.before}

    def _file(self, count: int) -> Path:
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.work / f"edits-{count}.jsonl"
        with jsonlines.open(file, "w", dumps=json.dumps) as writer:
            writer.write_all(record.as_dict() for record in self.tested[:count])
        return file


def numbers_in(text: str, flag: str, kind: Callable[[str], Number], lowest: Number, highest: Number) -> list[Number]:
    """Return numbers with commas between, in rising order, none outside the bounds.

    Raises:
        SettingsError: they are no such numbers.
    """
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not lowest <= found[0] <= found[-1] <= highest:
        wanted = f"numbers from {lowest:g} to {highest:g} with commas between"
        raise SettingsError(f"{flag} must be {wanted}, not {text!r}")
    return found
