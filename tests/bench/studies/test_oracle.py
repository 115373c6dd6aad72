from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.wise import residual
from support.helpers import alone, hooked, manifest_for, memory_for, random_rows, right_share, save_tiny
from support.loading import CPU
from torch import Tensor

from wisecli.artifacts.memory_manifest import write_memory
from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.evaluation.teacher_forcing import Measured, teacher_forced
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.progress import ignore_progress
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.memories.side_memory import SideMemory

ROWS = random_rows((1, 2), (4, 1), (11, 3), (7, 6), (2, 5), (6, 4), (9, 2), (3, 3), (5, 5), (8, 1), (10, 4), seed=21)


def edited_model(root: Path, kind: str, share: float = 1.0) -> EditedModel:
    """A tiny model with three memories made by hand; ``share`` of their thresholds' own heights."""
    base = save_tiny(root / "base")
    site = find_site(base, Checkpoint(base), 2)
    memory = memory_for(load_model(base, load=CPU).model, site, kind=kind, memories=3)
    memory = replace(memory, thresholds=(share * memory.thresholds[0],) * 3)
    (root / "memory").mkdir()
    edits = [Edit(str(number), "ba", "be") for number in range(3)]
    write_memory(root / "memory", manifest_for(base, memory, edits))
    return attach(root / "memory", load=CPU)


def measured(edited: EditedModel, holders: list[int | None] | None) -> list[Measured]:
    named: dict[str, Any] = {"batch_size": 4, "stage": "", "on_progress": ignore_progress}
    return teacher_forced(edited, ROWS, holders=holders, **named)


@torch.no_grad()
def opening(edited: EditedModel, row: Row) -> int:
    """The memory that opens by itself at a prompt's end."""
    return int(edited.decide(collate([row])).memory[0])


@pytest.mark.parametrize("kind", ["matrix", "lookup"])
def test_the_oracle_is_the_ordinary_measurement_wherever_the_router_was_right(tmp_path: Path, kind: str) -> None:
    edited = edited_model(tmp_path, kind, 0.3)
    ordinary = measured(edited, None)
    right = {place: own for place, row in enumerate(ROWS) if (own := opening(edited, row)) != UNROUTED}
    assert len(right) > 1
    assert len(set(right.values())) > 1
    given = [right.get(place, 0) for place in range(len(ROWS))]
    oracle = measured(edited, given)
    for place in right:
        assert oracle[place].before == ordinary[place].before
        assert astuple(oracle[place].after) == pytest.approx(astuple(ordinary[place].after), rel=1e-5)
        assert oracle[place].same == ordinary[place].same
    assert [one.opened for one in oracle] == given
    # A wrong memory is another thing than the right one.
    wrong = measured(edited, [(place + 1) % 3 for place in given])
    assert all(abs(wrong[place].after.loss - oracle[place].after.loss) > 1e-3 for place in right)


@pytest.mark.parametrize("kind", ["matrix", "lookup"])
def test_the_oracle_is_the_memory_itself_on_every_token_from_the_prompts_end(tmp_path: Path, kind: str) -> None:
    edited = edited_model(tmp_path, kind, 1e6)  # no token opens anything by itself
    memory, site = edited.manifest.memory, edited.manifest.site
    ordinary = measured(edited, None)
    assert {one.opened for one in ordinary} == {UNROUTED}
    holders = [place % 3 for place in range(len(ROWS))]
    for place, one in enumerate(measured(edited, list(holders))):
        row, number = ROWS[place], holders[place]
        with edited.unedited(), hooked(edited.model, site, _added(memory, number, row)):
            logits = alone(edited.model, row)
        assert one.after.right == pytest.approx(right_share(logits, row.target))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.target))
        assert one.after.loss == pytest.approx(float(loss), rel=1e-4)
        assert one.before == ordinary[place].before
    # Rows without a holder are left to the router.
    assert measured(edited, [None] * len(ROWS)) == ordinary


def _added(memory: SideMemory, number: int, row: Row) -> Any:
    """A hook that adds what one memory adds, from the prompt's end on: of a lookup the nearest of the edit's own keys,
    of those that prompts end in at the first of the columns, of those inside answers after it, if it is near or the
    token is the answer's own.
    """
    tokens, first = (*row.prompt, *row.target), len(row.prompt) - 1

    def hook(_module: object, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.clone()
        for place in range(first, output.shape[1]):
            key, token = inputs[0][0, place], tokens[place]
            changed[0, place] += residual(memory, number, key, place=place - first, token=token)
        return changed

    return hook
