"""A model with a side memory, as something to be measured."""

from collections.abc import Mapping, Sequence
from functools import partial

from wisecli.config import EvalSettings
from wisecli.evaluation.answers import Answer, Answers, Books, Targets, answered
from wisecli.evaluation.edited_model import EditedModel
from wisecli.evaluation.metrics import Question
from wisecli.evaluation.teacher_forcing import Measured, teacher_forced
from wisecli.models.layout.architectures import CACHED
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.prompts.tokenization import Row, row_of
from wisecli.models.running.generation import opened
from wisecli.models.running.shrinking_batches import unedited_beginnings
from wisecli.models.text_input import vocabulary_size
from wisecli.progress import ProgressCallback


class MemorySubject:
    """A model with a side memory, as something to be measured.

    Args:
        holders: the memory that answers a question, by prompt and target, in the place of the router's choice.
        known: what was answered already.
    """

    def __init__(
        self,
        edited: EditedModel,
        settings: EvalSettings,
        on_progress: ProgressCallback,
        holders: Mapping[tuple[str, str], int] | None = None,
        known: Books | None = None,
    ) -> None:
        self.edited, self.settings, self.on_progress, self.holders = edited, settings, on_progress, holders
        self.known = known or Books()
        self.tokenizer, self.config = edited.tokenizer, edited.model.config
        self._answering: dict[tuple[int, frozenset[int]], Answers] = {}
        self._opened: dict[str, bool] = {}
        shared = edited.manifest.site.above == CACHED and not edited.routed.answers_prompts
        self._beginnings = unedited_beginnings(edited.model) if shared else None

    def row(self, prompt: str, target: str, erased: bool = False) -> Row:
        """Return a prompt and its answer in tokens."""
        known = vocabulary_size(self.config)
        return row_of(self.tokenizer, self._asked(prompt), target, erased=erased, vocabulary=known)

    def teacher_forced(self, pairs: Sequence[Question], *, stage: str) -> list[Measured]:
        """Measure prompts and answers, the right tokens before each token of the answer."""
        rows = [self.row(*pair) for pair in pairs]
        holders = None
        if self.holders is not None:
            holders = [self.holders.get((pair.prompt, pair.answer)) for pair in pairs]
        return teacher_forced(
            self.edited,
            rows,
            batch_size=self.settings.batch_size,
            stage=stage,
            on_progress=self.on_progress,
            holders=holders,
        )

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int) -> tuple[list[str], list[str]]:
        """Return greedy answers, before and after."""
        asked, answering = [self._asked(prompt) for prompt in prompts], self.answering(max_new_tokens)
        before = answering.before(asked, stage="answers before")
        after = answering.after(asked, stage="answers after")
        return [answer.text for answer in before], [answer.text for answer in after]

    def answering(self, max_new_tokens: int, stops: frozenset[int] = frozenset()) -> Answers:
        """Return what answers in at most ``max_new_tokens``, the same object each time; ``stops`` end them as well."""
        key = max_new_tokens, stops
        if key not in self._answering:
            model, tokenizer = self.edited.model, self.tokenizer
            edited = partial(
                answered, model, tokenizer, max_new_tokens=max_new_tokens, stops=stops, beginnings=self._beginnings
            )

            def unedited(texts: Sequence[str], targets: Targets) -> list[Answer]:
                with self.edited.unedited():
                    return edited(texts, targets)

            self._answering[key] = Answers(
                tokenizer,
                unedited,
                edited,
                self.settings.batch_size,
                self.on_progress,
                opened=self.opened,
                known_before=self.known.before[key],
                known_after=self.known.after[key],
            )
        return self._answering[key]

    def opened(self, texts: Sequence[str]) -> list[bool]:
        """Return for which texts, as prompts, the memory opens."""
        new = [text for text in dict.fromkeys(texts) if text not in self._opened]
        found = opened(self.edited.model, self.tokenizer, new, batch_size=self.settings.batch_size)
        self._opened |= zip(new, found, strict=True)
        return [self._opened[text] for text in texts]

    def _asked(self, prompt: str) -> str:
        return chat_prompt(self.edited.tokenizer, prompt) if self.settings.chat else prompt
