"""Facts as ROME and MEMIT see them: an edit under several prefixes, and what its subject's last token should hold."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from wisecli.bench.methods.base import Bench, require_finite
from wisecli.bench.methods.weights.weight_editing import encode_row
from wisecli.editing.examples.context_prefixes import context_prefixes
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.prompts.tokenization import Batch, Row, collate
from wisecli.models.running.activations import Activations, capture
from wisecli.models.running.upper_layers import upper_logits

# What remains of a subject where its essence is to be kept: ``{subject} is a`` (Meng et al. 2022, section 3.1).
_ESSENCE = " is a"


@dataclass(frozen=True)
class SearchSettings:
    """How the vector at the subject's last token is searched for: Adam, ``limit`` bounds the change's norm as a share
    of what was there, ``essence`` weighs the KL term and ``decay`` the change's size.
    """

    rate: float
    steps: int
    limit: float
    essence: float
    decay: float
    stop_loss: float = 0.05


@dataclass(frozen=True)
class Fact:
    """An edit's rows: its prompt under each prefix, the bare one first, and last the essence ``{subject} is a``.

    ``columns`` (B,) hold the subject's last token, ``prompts`` is how many rows are prompts: without a subject in the
    edit's prompt there is no essence, and all are.
    """

    id: str
    batch: Batch
    columns: Tensor
    prompts: int


@dataclass(frozen=True)
class Part:
    """A fact's rows captured from the first subject's last token on, and its place in each of them: (B,) twice.

    What changes at the subject's last token changes nothing before it.
    """

    activations: Activations
    rows: Tensor
    columns: Tensor


# What leaves the layer (B, T - first, d) when the vector at the subject's last token changes by (d,).
Placed = Callable[[Part, Tensor], Tensor]


def prefixes_for(bench: Bench, count: int, tokens: int) -> list[str]:
    """Return the empty prefix, and ``count`` texts that the model writes itself."""
    if not count:
        return [""]
    loaded = bench.loaded
    return ["", *context_prefixes(loaded.model, loaded.tokenizer, count, tokens=tokens, seed=bench.seed)]


def read_fact(bench: Bench, edit: Edit, prefixes: Sequence[str]) -> Fact:
    """Return an edit in tokens. Without a subject in its prompt, the prompt's last token counts as the subject's.

    Raises:
        UnsuitableError: the tokenizer leaves nothing of the edit.
    """
    tokenizer, device = bench.loaded.tokenizer, bench.loaded.device
    span = _span(edit)
    texts = [prefix + edit.prompt for prefix in prefixes]
    ends = [len(text) if span is None else len(prefix) + span[1] for prefix, text in zip(prefixes, texts, strict=True)]
    rows = [encode_row(bench, text, edit) for text in texts]
    if span is not None:
        subject = edit.prompt[slice(*span)]
        texts.append(subject + _ESSENCE)
        ends.append(len(subject))
        rows.append(Row(tuple(tokenizer(texts[-1])["input_ids"]), ()))
    batch = collate(rows).to(device)
    columns = [
        batch.start + 1 - len(row.prompt) + token_before(tokenizer, text, row.prompt, end)
        for text, row, end in zip(texts, rows, ends, strict=True)
    ]
    return Fact(edit.id, batch, torch.tensor(columns, device=device), len(prefixes))


def _span(edit: Edit) -> tuple[int, int] | None:
    """Return the last place of the subject in the prompt, in any case."""
    if not edit.subject or not edit.subject.strip():
        return None
    found = list(re.finditer(re.escape(edit.subject.strip()), edit.prompt, re.IGNORECASE))
    return found[-1].span() if found else None


def token_before(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Sequence[int], end: int) -> int:
    """Return the index of the token that holds the character before ``end`` in a text."""
    head = tokenizer(text[:end])["input_ids"]
    differs = next((index for index, pair in enumerate(zip(head, tokens, strict=False)) if pair[0] != pair[1]), None)
    # In the whole text the head's last characters may belong to a longer token; then that token is meant.
    return max(min(len(head), len(tokens)) - 1 if differs is None else differs, 0)


def look(bench: Bench, site: MatrixSite, fact: Fact) -> Part:
    """Capture a fact's rows with the model as edited so far."""
    whole = capture(bench.loaded.model, site, fact.batch)
    cut = int(fact.columns.min())
    past = tuple((keys[:, :, :cut].clone(), values[:, :, :cut].clone()) for keys, values in whole.past)
    output = None if whole.output is None else whole.output[:, cut:]
    kept = replace(whole, first=cut, keys=whole.keys[:, cut:], hidden=whole.hidden[:, cut:], output=output, past=past)
    return Part(kept, torch.arange(len(fact.columns), device=fact.columns.device), fact.columns - cut)


def find_change(
    bench: Bench, site: MatrixSite, fact: Fact, part: Part, search: SearchSettings, placed: Placed, size: Tensor
) -> Tensor:
    """Return the change (d,) at the subject's last token that makes the layers above say the target under every prefix.

    The loss is the mean over prefixes of the target tokens' mean cross-entropy, plus the KL divergence of what is said
    of the essence from what was said of it, plus ``decay · ‖change‖ / size²``.

    Args:
        part: the fact's rows, as the model is now.
        size: norm of what is at the subject's last token now.

    Raises:
        UnsuitableError: the loss is not finite.
    """
    change = torch.zeros(site.d, device=size.device, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=search.rate)
    with torch.no_grad():
        _, before = _predictions(bench, site, fact, part, part.activations.hidden)
    for _ in range(search.steps):
        loss, now = _predictions(bench, site, fact, part, placed(part, change))
        # Without an essence there is no row to sum over.
        loss = loss + search.essence * F.kl_div(before, now, log_target=True, reduction="sum")
        # The root is safe at no change, where the norm has no gradient.
        loss = loss + search.decay * (change.square().sum() + 1e-12).sqrt() / size.square()
        require_finite(loss, f"edit {fact.id!r}")
        if loss < search.stop_loss:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            change.mul_((search.limit * size / change.norm().clamp(min=1e-12)).clamp(max=1.0))
    return change.detach()


def _predictions(bench: Bench, site: MatrixSite, fact: Fact, part: Part, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of the target's tokens (every prompt has the same), and the log-probabilities (1,
    V), or (0, V), of what follows the essence.
    """
    batch = fact.batch
    rows, columns = batch.labelled
    essence = torch.arange(fact.prompts, len(fact.columns), device=rows.device)
    select = torch.cat([rows, essence]), torch.cat([columns, torch.full_like(essence, batch.start)])
    logits = upper_logits(bench.loaded.model, site, part.activations, hidden, select).float()
    loss = F.cross_entropy(logits[: len(rows)], batch.targets)
    return loss, logits[len(rows) :].log_softmax(-1)
