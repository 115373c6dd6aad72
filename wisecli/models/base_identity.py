"""By what a base model is known, where something was learned of it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from wisecli.io.checkpoint import Checkpoint
from wisecli.io.digest import sha256_json
from wisecli.models.prompts.chat_template import template_digest


@dataclass(frozen=True)
class BaseIdentity:
    """What identifies a base model: ``exact`` in the user's cache, by its settings, weights and chat template;
    ``rounded`` in the package, by its weights in bfloat16 and its chat template, as its settings are written otherwise
    by other versions of transformers.

    What was learned of a model is no good for it once it is quantised or tuned.
    """

    exact: str
    rounded: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: str, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
        """Return the identity of a model, of whose settings ``config`` is a digest."""
        written = template_digest(tokenizer)
        template = [] if written is None else [written]
        exact, rounded = [config, checkpoint.sample, *template], [checkpoint.rounded_sample, *template]
        return cls(sha256_json(exact), sha256_json(rounded))
