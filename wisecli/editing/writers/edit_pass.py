"""What runs at every step of one edit, and which tokens of it count: the edit's rows beside an unrelated text.

In the code of the paper's authors all rows of an edit and its unrelated text are one batch, padded on the left, and
means are over every column of it: over padding, and over the target's last token, after which nothing is predicted.
Where padding's keys are long, that is most of what the margins see.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wisecli.config import EditSettings
from wisecli.data.corpus import unrelated_texts
from wisecli.editing.background.key_capture import keys_of_texts
from wisecli.editing.examples.training_examples import TrainingExamples
from wisecli.edits.record import Edit
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import NO_LABEL, Batch
from wisecli.models.running.activations import Activations, captured
from wisecli.progress import ProgressCallback


@dataclass(frozen=True)
class EditPass:
    """One edit's rows, captured whole where every token counts.

    ``counted`` (B, T - first) marks the tokens whose mean says how strongly a row calls the change; ``unrelated``
    (t, d_ff) are keys of a text that has nothing to do with the edit.
    """

    edits: tuple[int, ...]
    activations: Activations
    counted: Tensor
    unrelated: Tensor


@dataclass(frozen=True)
class UnrelatedText:
    """The unrelated text of an edit; one of the package's own (not ``is_own``) is cut to what the edit's rows take."""

    text: str
    is_own: bool


def unrelated_texts_of(edits: Sequence[Edit], part: Sequence[int], *, seed: int) -> dict[int, UnrelatedText]:
    """Return an unrelated text for each edit of a part, by the edit's number: the edit's own if it brings one."""
    plain = unrelated_texts(len(edits), seed=seed)
    own = {place: next(iter(edits[place].irrelevant), None) for place in part}
    return {
        place: UnrelatedText(plain[place] if text is None else text, text is not None) for place, text in own.items()
    }


def edit_passes(
    loaded: Loaded,
    site: Site,
    settings: EditSettings,
    batches: Sequence[TrainingExamples],
    texts: Mapping[int, UnrelatedText],
    on_progress: ProgressCallback,
) -> list[EditPass]:
    """Return the passes of batches, an edit each, in order.

    Args:
        texts: by the edits' numbers.
    """
    beside = [texts[int(examples.edits[0])] for examples in batches]
    # What is said in the place of an erased answer has no last token that is a target.
    if settings.padding != "counted" or any(batch.activations.batch.unwanted is not None for batch in batches):
        wanted = [unrelated.text for unrelated in beside]
        keys, text, *_ = keys_of_texts(loaded, site, wanted, batch_size=settings.batch_size, on_progress=on_progress)
        return [single_pass(settings, examples, keys[text == number]) for number, examples in enumerate(batches)]
    return list(_together(loaded, site, batches, beside))


def single_pass(settings: EditSettings, examples: TrainingExamples, unrelated: Tensor) -> EditPass:
    """Return a pass in which only the tokens that the router looks at count."""
    part = examples.activations
    return EditPass(tuple(examples.edits.tolist()), part, routed_tokens(settings, part), unrelated)


def _together(
    loaded: Loaded, site: Site, batches: Sequence[TrainingExamples], texts: Sequence[UnrelatedText]
) -> Iterator[EditPass]:
    """Yield passes in which every column counts, padding included."""
    padding = loaded.tokenizer.pad_token_id
    if padding is None:
        padding = loaded.tokenizer.eos_token_id or 0
    whole = []
    for examples, beside in zip(batches, texts, strict=True):
        batch = examples.activations.batch
        ids = loaded.tokenizer(beside.text)["input_ids"]
        if not beside.is_own:
            ids = ids[: max(len(row) for row in _rows(batch))]
        whole.append(padded(batch, ids, padding).to(loaded.device))
    found = captured(loaded.model, site, whole, stream=loaded.stream)
    for examples, activations in zip(batches, found, strict=True):
        rows = torch.arange(len(activations.keys) - 1, device=activations.keys.device)
        own = replace(activations, past=()).rows(rows)
        counted = torch.ones(own.keys.shape[:2], dtype=torch.bool, device=own.keys.device)
        yield EditPass(tuple(examples.edits.tolist()), own, counted, activations.keys[-1])


def padded(batch: Batch, unrelated: Sequence[int], padding: int) -> Batch:
    """Return rows of a batch, whole targets with them, and an unrelated text below: padded on the left to one width.

    What is learnt begins as many columns from the left as the longest prompt has tokens, as in the authors' code: below
    a text that is longer than every row, prompts' ends are learnt as well.
    """
    prompt = 1 + batch.start
    rows = [*_rows(batch), list(unrelated)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    labels = torch.full((len(rows), width - prompt + 1), NO_LABEL)
    labels[:-1, :-1] = ids[:-1, prompt:].where(mask[:-1, prompt:].bool(), NO_LABEL)
    return Batch(ids, mask, labels, batch.start)


def _rows(batch: Batch) -> list[list[int]]:
    """Return all tokens of each row, the target's last one included."""
    rows = []
    for ids, mask, labels in zip(batch.ids.cpu(), batch.mask.cpu(), batch.labels.cpu(), strict=True):
        rows.append([*ids[mask.bool()].tolist(), int(labels[labels != NO_LABEL][-1])])
    return rows


def routed_tokens(settings: EditSettings, part: Activations) -> Tensor:
    """Return which tokens of a batch say what answers it: (B, T - first)."""
    if settings.pooling == "mean":
        return part.batch.mask[:, part.first :].bool()
    columns = torch.arange(part.keys.shape[1], device=part.keys.device) + part.first
    return (columns == part.batch.start).expand(part.keys.shape[:2])
