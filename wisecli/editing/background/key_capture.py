"""Keys read off a base model: of whole texts, of the ends of prompts, and from those on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wisecli.errors import ModelError
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, collate, in_batches
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.hooks import hooked
from wisecli.progress import Event, ProgressCallback


class TextKeys(NamedTuple):
    """Keys (n, d_ff) of tokens, in float32; the text each is of, by number (n,); whether it is that text's last one
    (n,); and whether the model has a row for it (n,), without which it reads nothing there.
    """

    keys: Tensor
    text: Tensor
    last: Tensor
    known: Tensor


@torch.no_grad()
def window_keys(loaded: Loaded, site: Site, rows: Sequence[Row], *, batch_size: int) -> list[Tensor]:
    """Return keys (n, d_ff) of each row, in float32: at its prompt's last token and all target tokens but the last."""
    groups = list(in_batches(rows, batch_size, by_target=True, by_beginning=True))
    found: dict[int, Tensor] = {}
    for indices, activations in zip(
        groups, _captured(loaded, site, rows, groups, window=True, shared=True), strict=True
    ):
        own = zip(indices, activations.keys.float(), strict=True)
        found |= {index: keys[: len(rows[index].target)] for index, keys in own}
    return [found[index] for index in range(len(rows))]


def _captured(
    loaded: Loaded,
    site: Site,
    rows: Sequence[Row],
    groups: Sequence[Sequence[int]],
    *,
    window: bool,
    shared: bool = False,
) -> Iterator[Activations]:
    """Yield activations up to the site, of groups of rows."""
    batches = (collate([rows[index] for index in indices]).to(loaded.device) for indices in groups)
    return captured(loaded.model, site, batches, stream=loaded.stream, above=False, window=window, shared=shared)


@torch.no_grad()
def keys_of_texts(
    loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, on_progress: ProgressCallback
) -> TextKeys:
    """Return the keys of every token of some texts; those that are not finite are left out.

    Raises:
        ModelError: none is.
    """
    rows = [row for row in (Row(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in texts) if row.prompt]
    groups = list(in_batches(rows, batch_size))
    # Filled as they come: joined at the end, they would be there twice.
    keys = torch.empty(sum(map(len, rows)), site.width, device=loaded.device)
    text, last, known = [], [], []
    read = done = 0
    embed = loaded.model.get_input_embeddings()
    for indices, activations in zip(groups, _captured(loaded, site, rows, groups, window=False), strict=True):
        non_padding = activations.batch.mask.bool()
        own = activations.keys[non_padding]
        keys[read : read + len(own)] = own
        text.append(torch.tensor(indices, device=non_padding.device)[:, None].expand_as(non_padding)[non_padding])
        ends = torch.zeros_like(non_padding)
        ends[:, -1] = True
        last.append(ends[non_padding])
        known.append(embed(activations.batch.ids[non_padding]).any(-1))
        read, done = read + len(own), done + len(indices)
        on_progress(Event("unrelated text", done, len(rows)))
    finite = keys.isfinite().all(-1)
    if not finite.any():
        raise ModelError("the model gives nothing finite for any text; are its weights whole?")
    if not finite.all():
        keys = keys[finite]
    return TextKeys(keys, *(torch.cat(parts)[finite] for parts in (text, last, known)))


@torch.no_grad()
def prompt_ends(
    loaded: Loaded, sites: Sequence[Site], prompts: Sequence[str], *, batch_size: int, on_progress: ProgressCallback
) -> list[Tensor]:
    """Return keys (n, d_ff) at the last token of each prompt, in order, for every site, from one pass.

    Args:
        sites: from the lowest layer up.
    """
    rows = [Row(tuple(loaded.tokenizer(prompt)["input_ids"]), ()) for prompt in prompts]
    groups = list(in_batches(rows, batch_size, by_beginning=True))
    read: list[list[Tensor]] = [[] for _ in sites]
    with ExitStack() as hooks:
        for own, site in zip(read[:-1], sites[:-1], strict=True):
            hooks.enter_context(hooked(site.watched(loaded.model).register_forward_hook(_keeper(site, own))))
        found = _captured(loaded, sites[-1], rows, groups, window=True, shared=len(sites) == 1)
        done = 0
        for indices, activations in zip(groups, found, strict=True):
            read[-1].append(activations.keys[:, -1].clone())
            done += len(indices)
            on_progress(Event("reworded facts", done, len(rows)))
    order = torch.tensor([index for indices in groups for index in indices]).argsort()
    return [torch.cat(own)[order.to(loaded.device)].float() for own in read]


def _keeper(site: Site, read: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        read.append(site.keys(inputs, output)[:, -1].clone())

    return keep
