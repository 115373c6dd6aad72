"""Facts as ROME and MEMIT see them: an edit under several prefixes, and what its subject's last token should hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from wisecli.baselines.protocol import Bench, UnsuitableError
from wisecli.baselines.rewritten import encoded
from wisecli.capture import Activations, capture, suffix_logits
from wisecli.contexts import context_prefixes
from wisecli.edits import Edit
from wisecli.encode import NO_LABEL, Batch, Row, collate
from wisecli.site import Site

# What remains of a subject where its essence is to be kept: ``{subject} is a`` (Meng et al. 2022, section 3.1).
_ESSENCE = " is a"


@dataclass(frozen=True)
class Search:
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
    """An edit's rows, the bare prompt's first; ``columns`` (B,) hold the subject's last token.

    ``essence`` is the row ``{subject} is a``, if the edit has a subject in its prompt.
    """

    id: str
    batch: Batch
    columns: Tensor
    essence: tuple[Batch, Tensor] | None


@dataclass(frozen=True)
class Part:
    """Captured rows from the first subject's last token on, and its place in each of them: (B,) twice.

    What changes at the subject's last token changes nothing before it.
    """

    activations: Activations
    rows: Tensor
    columns: Tensor


# What leaves the layer (B, T - first, d) when the vector at the subject's last token changes by (d,).
Placed = Callable[[Part, Tensor], Tensor]


def prefixes_for(bench: Bench, count: int, tokens: int) -> list[str]:
    """No prefix, and ``count`` texts that the model writes itself."""
    loaded = bench.loaded
    return ["", *context_prefixes(loaded.model, loaded.tokenizer, count, tokens=tokens, seed=bench.seed)]


def read_fact(bench: Bench, edit: Edit, prefixes: Sequence[str]) -> Fact:
    """An edit in tokens. Without a subject in its prompt, the prompt's last token counts as the subject's.

    Raises:
        UnsuitableError: the tokenizer leaves nothing of the edit.
    """
    tokenizer, device = bench.loaded.tokenizer, bench.loaded.device
    span = _span(edit)
    prompts = [prefix + edit.prompt for prefix in prefixes]
    rows = [encoded(bench, prompt, edit) for prompt in prompts]
    batch = collate(rows).to(device)
    places = []
    for prefix, prompt, row in zip(prefixes, prompts, rows, strict=True):
        end = len(prompt) if span is None else len(prefix) + span[1]
        places.append(batch.start + 1 - len(row.prompt) + token_before(tokenizer, prompt, row.prompt, end))
    essence = None
    if span is not None:
        subject = edit.prompt[slice(*span)]
        text = subject + _ESSENCE
        tokens = tuple(tokenizer(text)["input_ids"])
        place = token_before(tokenizer, text, tokens, len(subject))
        essence = collate([Row(tokens, ())]).to(device), torch.tensor([place], device=device)
    return Fact(edit.id, batch, torch.tensor(places, device=device), essence)


def _span(edit: Edit) -> tuple[int, int] | None:
    """Where the subject stands last in the prompt, in whatever case."""
    if not edit.subject or not edit.subject.strip():
        return None
    found = list(re.finditer(re.escape(edit.subject.strip()), edit.prompt, re.IGNORECASE))
    return found[-1].span() if found else None


def token_before(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Sequence[int], end: int) -> int:
    """Which of a text's tokens holds the character before ``end``."""
    head = tokenizer(text[:end])["input_ids"]
    same = next((place for place, pair in enumerate(zip(head, tokens, strict=False)) if pair[0] != pair[1]), None)
    # Where the text goes on the head's last characters may be part of another token, which is then the one.
    return max(min(len(head), len(tokens)) - 1 if same is None else same, 0)


def look(bench: Bench, site: Site, batch: Batch, columns: Tensor) -> Part:
    """Capture rows with the model as it is now, from the first of their subjects' last tokens on."""
    whole = capture(bench.loaded.model, site, batch)
    rows = torch.arange(len(columns), device=columns.device)
    cut = int(columns.min())
    past = tuple((keys[:, :, :cut].clone(), values[:, :, :cut].clone()) for keys, values in whole.past)
    output = None if whole.output is None else whole.output[:, cut:]
    kept = replace(whole, first=cut, keys=whole.keys[:, cut:], hidden=whole.hidden[:, cut:], output=output, past=past)
    return Part(kept, rows, columns - cut)


def find_change(
    bench: Bench, site: Site, fact: Fact, parts: Sequence[Part], search: Search, placed: Placed, size: Tensor
) -> Tensor:
    """The change (d,) at the subject's last token that makes the layers above say the target under every prefix.

    The loss is the mean over prefixes of the target tokens' mean cross-entropy, plus the KL divergence of what is said
    of the essence from what was said of it, plus ``decay · ‖change‖ / size²``.

    Args:
        parts: the fact's rows and, if it has one, its essence, as the model is now.
        size: norm of what is at the subject's last token now.

    Raises:
        UnsuitableError: the loss is not finite.
    """
    change = torch.zeros(site.d, device=size.device, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=search.rate)
    with torch.no_grad():
        before = [_essence(bench, site, part, part.activations.hidden) for part in parts[1:]]
    for _ in range(search.steps):
        loss = target_loss(bench, site, parts[0], placed(parts[0], change))
        for part, logs in zip(parts[1:], before, strict=True):
            now = _essence(bench, site, part, placed(part, change))
            loss = loss + search.essence * F.kl_div(logs, now, log_target=True, reduction="sum")
        # The root is safe at no change, where the norm has no slope.
        loss = loss + search.decay * (change.square().sum() + 1e-12).sqrt() / size.square()
        if not loss.isfinite():
            raise UnsuitableError(f"the loss of edit {fact.id!r} is not finite")
        if loss < search.stop_loss:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            change.mul_((search.limit * size / change.norm().clamp(min=1e-12)).clamp(max=1.0))
    return change.detach()


def target_loss(bench: Bench, site: Site, part: Part, hidden: Tensor) -> Tensor:
    """Mean cross-entropy of the target's tokens: every row holds the same target."""
    batch = part.activations.batch
    logits = suffix_logits(bench.loaded.model, site, part.activations, hidden, batch.labelled).float()
    return F.cross_entropy(logits, batch.labels[batch.labels != NO_LABEL])


def _essence(bench: Bench, site: Site, part: Part, hidden: Tensor) -> Tensor:
    """Log-probabilities (1, V) of what follows the essence's last token."""
    zero = torch.zeros(1, dtype=torch.long, device=hidden.device)
    select = zero, zero + part.activations.batch.start
    logits = suffix_logits(bench.loaded.model, site, part.activations, hidden, select)
    return logits.float().log_softmax(-1)
