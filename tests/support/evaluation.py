"""An edited model's answers and logits, worked out by loops over single tokens."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from support.helpers import (
    alone,
    choice_of,
    greedy_by_loop,
    hooked,
    manifest_for,
    memory_for,
    routed_by_loop,
    save_tiny,
)
from support.loading import CPU
from wisecli.artifacts.memory_manifest import write_memory
from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row


def edited_model(
    root: Path,
    *,
    kind: str = "matrix",
    pooling: str = "last",
    memories: int = 1,
    edits: Sequence[Edit] = (),
    architecture: str = "llama",
) -> EditedModel:
    """A tiny model with a memory made by hand, written to disk and attached."""
    base = save_tiny(root / "base", architecture)
    site = find_site(base, Checkpoint(base), 2)
    memory = memory_for(load_model(base, load=CPU).model, site, kind=kind, pooling=pooling, memories=memories)
    (root / "memory").mkdir()
    write_memory(root / "memory", manifest_for(base, memory, edits or [Edit("only", "ba", "be")]))
    return attach(root / "memory", load=CPU)


def logits_by_loop(edited: EditedModel, row: Row) -> Tensor:
    """Logits of the edited model for one row, decided and answered in loops over tokens."""
    site, memory = edited.manifest.site, edited.manifest.memory
    with edited.unedited():
        chosen = choice_of(edited.model, site, memory, row.prompt)
        with hooked(edited.model, site, routed_by_loop(memory, len(row.prompt), chosen, row.target)):
            return alone(edited.model, row)


def unedited_logits(edited: EditedModel, row: Row) -> Tensor:
    with edited.unedited():
        return alone(edited.model, row)


def text_of(edited: EditedModel, tokens: Sequence[int]) -> str:
    text = edited.tokenizer.decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def answer_of(edited: EditedModel, prompt: str, count: int, *, memory: bool = True, end: int | None = None) -> str:
    tokens = edited.tokenizer(prompt)["input_ids"]
    held = edited.manifest.memory if memory else None
    with edited.unedited():
        answer = greedy_by_loop(edited.model, edited.manifest.site, held, tokens, count, end=end)
    return text_of(edited, answer)
