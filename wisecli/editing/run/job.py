"""What a run of ``wise edit`` is to do, and a part of it that is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wisecli.config import EditSettings, LoadOptions
from wisecli.edits.record import Edit
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.editing.run.staging import FinishedPart
    from wisecli.models.layout.site import Site


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of editing as plain data that any process can read.

    ``target_module`` is the path of the value matrix, or of the layers, if it is not the architecture's usual one.
    ``threads`` decides the order in which numbers are added up, and with it the last bits of a shard; 0 stands for what
    the first worker runs with. ``known``, if any are to be left out, are edits that the model says already. ``learned``
    are shards of the same base model, with which these are to be merged: what they have learned of it is taken over.

    Raises:
        SettingsError: prompts are to be decided by the mean over their tokens, which these shards would not keep, or a
            matrix is to be edited behind a layer.
    """

    model: str
    settings: EditSettings
    edits: tuple[Edit, ...]
    load: LoadOptions = LoadOptions()
    target_module: str | None = None
    threads: int = 0
    known: tuple[Edit, ...] | None = None
    learned: Path | None = None

    def __post_init__(self) -> None:
        if self.settings.pooling == "mean" and not self.settings.sequential:
            raise SettingsError("--set pooling=mean is for shards written by the paper's rule: give --preset paper")
        if self.settings.site == "layer" and not self.settings.by_facts:
            raise SettingsError("--set site=layer is for what the closed form writes, and the gradient's is a matrix")

    @property
    def parts(self) -> list[range]:
        """The edits of every shard, by their places."""
        settings = self.settings
        return split_edits(len(self.edits), shards=settings.shards, edits_per_shard=settings.edits_per_shard)


def split_edits(count: int, *, shards: int | None, edits_per_shard: int) -> list[range]:
    """Deal ``count`` edits, in order, to shards of like size.

    Args:
        shards: how many; if not given, as few as hold ``edits_per_shard`` each.

    Raises:
        SettingsError: more shards than edits.
    """
    wanted = shards if shards is not None else math.ceil(count / edits_per_shard)
    if wanted > count:
        raise SettingsError(f"--set shards={wanted} is more than the {count} edits; every shard needs at least one")
    bounds = [round(index * count / wanted) for index in range(wanted + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def settings_at(site: Site, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that a manifest keeps with the kind of its site, which older versions did not keep."""
    return {"site": site.name, **settings}


@dataclass(frozen=True)
class Written:
    """A part that is done, and what puts its shard into a file."""

    number: int
    done: FinishedPart
    save: Callable[[Path], None]
