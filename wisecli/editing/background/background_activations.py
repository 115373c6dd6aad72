"""What a base model makes of text that no edit may touch: measured once a model and layer, then cached.

A sample of keys that edits must stay away from calibrates the router. Two second moments whiten keys for it. That of
all *tokens* is for keys inside answers. That of *wording* is for the keys that prompts end in: the moment of those,
plus, many times over, of what a change of wording alone does to them. Whitened by it, keys of one fact asked in several
ways come close, and keys of different facts asked in the same words come apart. Where edits are written in several
forms of prompts, facts and texts are read in those forms as well, so that a form counts as a wording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wisecli.artifacts.background_stats import _VERSION, BackgroundStats, _from_tensors, save_background
from wisecli.artifacts.shard import half
from wisecli.data.corpus import reworded_facts, subjects_for, unrelated_texts
from wisecli.editing.background.key_capture import keys_of_texts, prompt_ends, window_keys
from wisecli.editing.background.sample_sizes import CALIBRATION_KEYS, CONTINUATION_TOKENS, CONTINUED
from wisecli.editing.examples.context_prefixes import continuations
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import keep_in_cache, load_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.chat_template import chat_prompt
from wisecli.models.prompts.prompt_forms import Form
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running.generation import generate
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.memories.whitening import Moment, even, leading

# One fact in so many is asked in the chat template as well: its prompts are long.
_CHATTED = 4
# The share of unrelated texts that are asked in the chat template, too; half of them, with answers, calibrate.
_ASKED = 0.4
# Where forms of prompts are told, one fact in so many is asked in each of them, in so many wordings; and one text in so
# many.
_FORMED, _WAYS, _FORMED_TEXTS = 8, 2, 5
# How often what wording does counts beside the keys themselves. More changes nothing; at 0 a rephrase in ten is lost.
_WORDING = 8.0
# Beside keys of this size, what wording does to them is nothing.
_NOTHING = 1e-4


def measure_background(
    loaded: Loaded,
    site: Site,
    gives: Callable[[Tensor], Tensor],
    identity: str,
    *,
    texts: int,
    chat: bool,
    forms: Sequence[Form] = (),
    batch_size: int,
    seed: int,
    on_progress: ProgressCallback,
) -> BackgroundStats:
    """Read text of many kinds through the model up to the site, or take what the cache remembers of it.

    Args:
        gives: what the unedited site gives at keys: (n, d_ff) → (n, d).
        identity: of the base model, for the cache.
        texts: how many texts; half of them are kept from writers, for calibration.
        chat: whether facts are asked in the model's chat template as well.
        forms: further forms of prompts that facts and texts are read in.
    """
    about = [
        identity,
        site.as_dict(),
        texts,
        chat,
        [form.label for form in forms],
        seed,
        str(loaded.model.dtype),
        loaded.device.type,
        _VERSION,
    ]
    path = cache_path("unrelated") / f"{sha256_json(about)[:32]}.safetensors"
    try:
        return _from_tensors(load_tensors(path), path, site.width)
    except DamagedFileError:
        on_progress(Event("unrelated text"))
    read = _Reader(loaded, site, batch_size, on_progress)
    found = _measure(read, gives, texts=texts, chat=chat, forms=forms, seed=seed)
    keep_in_cache(path, lambda working: save_background(working, found, whole=True))
    return found


class _Reader(NamedTuple):
    """Reads the keys of texts."""

    loaded: Loaded
    site: Site
    batch_size: int
    on_progress: ProgressCallback

    def ends(self, prompts: Sequence[str]) -> Tensor:
        """Return the keys (n, d_ff) at the last token of each prompt."""
        with quick_products(self.loaded, self.site):
            return prompt_ends(
                self.loaded, [self.site], prompts, batch_size=self.batch_size, on_progress=self.on_progress
            )[0]

    def ends_in(self, forms: Sequence[Form], prompts: Sequence[str]) -> Tensor:
        """Return the keys at the last token of every prompt in every form, prompt by prompt."""
        return self.ends([form.render(self.loaded.tokenizer, prompt) for prompt in prompts for form in forms])


def _measure(
    read: _Reader, gives: Callable[[Tensor], Tensor], *, texts: int, chat: bool, forms: Sequence[Form], seed: int
) -> BackgroundStats:
    """Measure the keys of unrelated texts, of facts in several wordings, and of both in a chat and in prompt forms."""
    loaded, site, size = read.loaded, read.site, read.batch_size
    plain, whole = unrelated_texts(texts, seed=seed), -(-texts // CONTINUED)
    continued = continuations(loaded.model, loaded.tokenizer, plain[:whole], tokens=CONTINUATION_TOKENS, seed=seed)
    with quick_products(loaded, site):
        keys, text, last, known = keys_of_texts(
            loaded, site, [*continued, *plain[whole:]], batch_size=size, on_progress=read.on_progress
        )
    facts, unseen = reworded_facts(subjects_for(texts), seed=seed), text % 2 == 0
    fact_keys = _keys_by_fact(read.ends([way for fact in facts for way in fact]), len(facts))
    median = _median_length(gives(keys), known)
    spaced = torch.linspace(0, int(unseen.sum()) - 1, min(CALIBRATION_KEYS, int(unseen.sum()))).long()
    sample, writer_keys = keys[unseen][spaced.to(keys.device)], keys[~unseen]
    separate, offsets, chatting = sample[:0], [_wording_offsets(fact_keys)], None
    if chat:
        chats = _chats(loaded, site, plain[: max(2, round(_ASKED * texts))], batch_size=size, seed=seed)
        separate, chosen = torch.cat(chats[::2]), facts[::_CHATTED]
        reworded = read.ends([chat_prompt(loaded.tokenizer, way) for fact in chosen for way in fact])
        chat_keys = _keys_by_fact(reworded, len(chosen))
        firsts = torch.stack([own[0] for own in chats[1::2]])
        chatting = _wording(torch.cat([firsts, chat_keys.flatten(0, 1)]), [_wording_offsets(chat_keys)])
    ends = torch.cat([keys[last & ~unseen], fact_keys.flatten(0, 1)])
    if forms:
        chosen, some_texts = facts[::_FORMED], plain[: max(2, len(plain) // _FORMED_TEXTS)]
        form_keys = _keys_by_fact(read.ends_in(forms, [way for fact in chosen for way in fact[:_WAYS]]), len(chosen))
        offsets.append(_wording_offsets(form_keys))
        ends = torch.cat([ends, form_keys.flatten(0, 1), read.ends_in(forms, some_texts[1::2])])
        separate = torch.cat([separate, read.ends_in(forms, some_texts[::2])])
    sample = torch.cat([sample, separate])
    marked = torch.arange(len(sample)) >= len(sample) - len(separate)
    tokens = leading(keys.div_(len(keys) ** 0.5))  # in place, :func:`scaled` would copy them
    return BackgroundStats(
        _rounded(sample), marked, tokens, _wording(ends, offsets), median.cpu(), _rounded(writer_keys), chatting
    )


def _median_length(states: Tensor, known: Tensor) -> Tensor:
    """Return the median length (1,) of states (n, d), of the tokens that the model has a row for, if of any."""
    lengths: Tensor = states.norm(dim=-1)
    return (lengths[known] if known.any() else lengths).median().reshape(1)


def _chats(loaded: Loaded, site: Site, texts: Sequence[str], *, batch_size: int, seed: int) -> list[Tensor]:
    """Return keys (n, d_ff) of the model's answers to texts in its chat template, from each prompt's last token on."""
    prompts = [chat_prompt(loaded.tokenizer, text) for text in texts]
    answers = generate(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_new_tokens=CONTINUATION_TOKENS,
        batch_size=batch_size,
        sampling_seed=seed,
    )
    asked = [tuple(loaded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    rows = [Row(prompt, tuple(answer) or prompt[-1:]) for prompt, answer in zip(asked, answers, strict=True)]
    with quick_products(loaded, site):
        return window_keys(loaded, site, rows, batch_size=batch_size)


def _keys_by_fact(reworded: Tensor, facts: int) -> Tensor:
    """Return keys (facts, ways, d_ff) of facts that were asked in as many ways each; what is not finite is left out."""
    ways = reworded.view(facts, -1, reworded.shape[-1])
    return ways[ways.isfinite().flatten(1).all(-1)]


def _wording_offsets(ways: Tensor) -> Tensor:
    """Return how far keys (facts, ways, d_ff) lie from the mean of their fact: (facts · ways, d_ff)."""
    return (ways - ways.mean(1, keepdim=True)).flatten(0, 1)


def _wording(ends: Tensor, offsets: Sequence[Tensor]) -> Moment:
    """Return the moment of prompts' last keys (n, d_ff), with several kinds of wording offsets in equal shares."""
    # What does nothing leaves rounding errors, which must not be blown up.
    offsets = [offset for offset in offsets if offset.norm() > _NOTHING * ends.norm()]
    return leading(torch.cat([even(ends), *(even(offset) * (_WORDING / len(offsets)) ** 0.5 for offset in offsets)]))


def _rounded(keys: Tensor) -> Tensor:
    """Return keys rounded as the cache stores them, so that a second run writes the same bytes."""
    return half(keys.cpu()).float()
