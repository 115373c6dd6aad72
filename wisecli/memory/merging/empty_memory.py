"""The memory that holds no edit: nothing ever opens it, so that the model answers as its base does."""

from dataclasses import asdict

import torch

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.artifacts.shard_manifest import ShardDirectory
from wisecli.config import MergeSettings
from wisecli.environment import versions
from wisecli.routing.memories.calibration import Calibration
from wisecli.routing.memories.side_memory import SideMemory


def empty_memory(shards: ShardDirectory, settings: MergeSettings, *, model: str | None = None) -> Manifest:
    """Return a memory of one matrix that changes nothing, and never scores above its threshold.

    Args:
        shards: some that the memory was made of before; they say what is edited.
        settings: how edits that come later are to be merged.
        model: where the base model is now, if not where the shards say.
    """
    site = shards.site
    tensors = {"columns": torch.zeros(1, 1, dtype=torch.long), "delta": torch.zeros(1, site.d, 1)}
    return Manifest(
        model or shards.model,
        shards.revision,
        shards.fingerprint,
        site,
        SideMemory(tensors, (1.0,)),
        (Calibration(1.0, "no edits", 0.0, 0.0, {}, {}),),
        ((),),
        {**asdict(settings), "shards": []},
        (),
        versions(),
    )
