"""A model with its memory in place, from whichever directory holds them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wisecli.artifacts.directory_kind import find_base
from wisecli.artifacts.memory_manifest import Manifest
from wisecli.config import LoadOptions
from wisecli.edits.record import Edit
from wisecli.models.loading import load_model
from wisecli.models.prompts.chat_template import turn_marks
from wisecli.models.prompts.tokenization import Batch
from wisecli.models.running.activations import capture
from wisecli.models.streaming.layer_stream import LayerStream
from wisecli.routing.deciding.decision import AnswerTokens, Decision, TokenChoices
from wisecli.routing.deciding.prompt_window import UNROUTED, Answering, Tokens
from wisecli.routing.layers.routed_layer import Routed
from wisecli.routing.passes.routed_generation import decoder_of
from wisecli.routing.passes.routed_pass import RoutedDecoder


@dataclass(frozen=True)
class EditedModel:
    """A model with a memory in its place."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    routed: Routed
    manifest: Manifest
    stream: LayerStream | None = None

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Return a context in which the model is its base: nothing is routed."""
        with self.routed.called_with(off=True):
            yield

    @torch.no_grad()
    def decide(self, batch: Batch) -> Decision:
        """Return what the prompts of a batch decide, which end in its column ``start``."""
        end = torch.full((len(batch.ids),), batch.start, device=batch.ids.device)
        return self.decoder.decide(batch.ids, batch.mask.bool(), end)

    @property
    def decoder(self) -> RoutedDecoder:
        """The part of the model that decides about prompts."""
        found = decoder_of(self.model)
        assert found is not None, "a memory was installed in it"
        return found

    @torch.no_grad()
    def choices(self, keys: Tensor, batch: Batch, *, forced: Tensor | None = None) -> TokenChoices:
        """Return what answers each token of a batch, by its keys (B, T, d_ff): three (B, T).

        Args:
            forced: the memory (B,) that answers from the prompt's end on; ``UNROUTED`` leaves a row to the router.
        """
        found, tokens = self._decided(keys, batch)
        if forced is not None:
            answers = tokens.place >= 0
            own = self.routed.choices(keys, forced[:, None].where(answers, UNROUTED), tokens).chosen
            found = replace(found, chosen=own.where(answers & (forced != UNROUTED)[:, None], found.chosen))
        return replace(found, chosen=found.chosen.where(batch.mask.bool(), UNROUTED))

    def choices_of_row(self, batch: Batch) -> TokenChoices:
        """Return what answers each token of a batch of one row, by the unedited model's keys: three (T,)."""
        with self.unedited():  # what a memory adds leaves the keys of its own layer as they are
            keys = capture(self.model, self.manifest.site, batch, above=False).keys
        found = self.choices(keys, batch)
        return TokenChoices(*(part[0] for part in (found.chosen, found.score_ratio, found.nearest)))

    def edit_of(self, memory: int) -> Edit | None:
        """Return the edit with this number, or ``None`` if memories hold several edits or it is no number of one."""
        known = self.manifest.memory.by_edit and 0 <= memory < len(self.manifest.edits)
        return self.manifest.edits[memory] if known else None

    def _decided(self, keys: Tensor, batch: Batch) -> tuple[TokenChoices, AnswerTokens]:
        """Return what answers each token, with the score of the nearest memory at a prompt's end, and the tokens."""
        end = torch.full((len(keys),), batch.start, device=keys.device)
        decision = self.decide(batch)
        tokens = Tokens(batch.ids, batch.mask.bool(), batch.ids[:, :0], torch.full_like(end, UNROUTED))
        route = self.decoder.routed(tokens, Answering(self.routed.numbers(decision), end))
        at_end = route.tokens.place == 0
        shown = torch.where(at_end & (route.memory == UNROUTED), decision.nearest[:, None], route.memory)
        found = self.routed.choices(keys, shown, route.tokens)
        chosen = found.chosen.where(route.memory != UNROUTED, UNROUTED)
        score_ratio = torch.where(at_end, decision.score_ratio[:, None], found.score_ratio)
        return TokenChoices(chosen, score_ratio, found.nearest), route.tokens


def attach(memory: Path, *, model: str | None = None, load: LoadOptions = LoadOptions()) -> EditedModel:
    """Load the base model of a memory (or of an exported directory) and put the memory in its place.

    Args:
        load: of a model that does not fit into its ``memory_budget`` only the edited layer and those above it are
            held, the others are read as they run. The revision is the one that the memory names.

    Raises:
        WiseError: either cannot be read, or they do not belong together.
    """
    directory, manifest = find_base(memory, model)
    site = manifest.site
    loaded = load_model(directory, load, layers=site.layer_module.rpartition(".")[0])
    if loaded.stream is not None:
        loaded.stream.hold(range(site.layer, len(loaded.stream.layers)))
    marks = turn_marks(loaded.tokenizer)
    routed = site.install(loaded.model, manifest.memory, marks)
    routed.to(loaded.device)
    return EditedModel(loaded.model, loaded.tokenizer, routed, manifest, loaded.stream)
