"""``wise generate``: an edited model's answers, and which memory gave each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wisecli.config import LoadOptions
from wisecli.errors import SettingsError
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.export.stock.stock_manifest import has_router_blocks
from wisecli.models.loading import load_model
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.generation import generate as generate_tokens
from wisecli.routing.deciding.prompt_window import UNROUTED


@dataclass(frozen=True)
class Step:
    """One token of the answer: the strongest memory's score and threshold where it was decided, and who answered.

    ``memory`` is the number of the side memory, or ``None`` for the main memory; ``edit`` the prompt of the edit whose
    key was nearest, where the memory is a lookup.
    """

    token: str
    memory: int | None
    score: float
    threshold: float
    edit: str | None = None


@dataclass(frozen=True)
class Answer:
    """A prompt's greedy answer; ``steps`` only if asked for."""

    prompt: str
    text: str
    steps: tuple[Step, ...] = ()


def generate(
    memory: Path,
    prompts: Sequence[str],
    *,
    model: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    explain: bool = False,
    chat: bool = False,
    load: LoadOptions = LoadOptions(),
) -> list[Answer]:
    """Answer prompts greedily, up to the end of text.

    Args:
        memory: a memory directory or an exported one; one with a gate of a stock architecture is a model by itself.
        explain: also say which memory answered each token.
        chat: put each prompt into the model's chat template.

    Raises:
        WiseError: the memory or the model cannot be used.
    """
    in_blocks = has_router_blocks(memory)
    if in_blocks and explain:
        raise SettingsError(f"--explain: {memory} has no router that could be asked; explain its memory")
    edited = load_model(memory, load) if in_blocks else attach(memory, model=model, load=load)
    asked = [chat_prompt(edited.tokenizer, prompt) for prompt in prompts] if chat else prompts
    answers = generate_tokens(
        edited.model, edited.tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    texts = edited.tokenizer.batch_decode(answers, skip_special_tokens=True)
    explained = [
        _explain(edited, p, tokens) if explain and isinstance(edited, EditedModel) else ()
        for p, tokens in zip(asked, answers, strict=True)
    ]
    return [Answer(p, text.strip(), steps) for p, text, steps in zip(prompts, texts, explained, strict=True)]


def _explain(edited: EditedModel, prompt: str, answer: Sequence[int]) -> tuple[Step, ...]:
    """Return scores at the tokens that predicted each answer token, from one pass over the whole text."""
    if not answer:
        return ()
    row = Row(tuple(edited.tokenizer(prompt)["input_ids"]), tuple(answer))
    batch = collate([row]).to(edited.model.device)
    routed, decided = edited.routed, edited.choices_of_row(batch)
    steps = []
    for column, token in enumerate(answer, start=batch.start):
        best, memory = (int(routed.memory_of_choice(choices[column])) for choices in (decided.nearest, decided.chosen))
        threshold = routed.thresholds[best]
        who = None if memory == UNROUTED else memory
        closest = edited.edit_of(best)
        score = float(decided.score_ratio[column]) * threshold
        text = str(edited.tokenizer.decode([token]))
        steps.append(Step(text, who, score, threshold, None if closest is None else closest.prompt))
    return tuple(steps)
