"""Detectors of subjects: for each a direction and an offset that tell the last token of its name from all others.

They read the normed state behind the router's layer, which by then holds the whole name. States are whitened by what
the text around a name does to them; then each subject's are told from those of made-up names, of unrelated text and of
other subjects (:class:`~wisecli.export.stock.router.separation.Separation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError
from wisecli.export.stock.edit_states import ReadTexts
from wisecli.export.stock.router.separation import Separation, from_group_means, inverse_root
from wisecli.export.stock.subject_texts import (
    SubjectText,
    name_of,
    texts_behind_others,
    texts_on_edits,
    texts_on_names,
    texts_on_near_names,
    texts_on_other_things,
)
from wisecli.export.stock.text_states import StateCapture, TextStates, last_site
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.models.running.quick_products import quick_products
from wisecli.progress import Event

_VERSION = 11
# Tokens inside names, and as many around them, that detectors are told from, of edits and of others; and tokens of
# texts on other things.
_OWN_TOKENS, _TOKENS, _ELSEWHERE = 60000, 12000, 110000
# One in so many texts on other things is read behind the last layer, too, and so many of its tokens are kept.
_EVERY, _LAST = 4, 36000
# Tokens whose norm is this share of others' inverse are sinks; so many are kept.
_SINK, _SINKS = 0.2, 200


@dataclass(frozen=True)
class DetectorSettings:
    """How detectors are fitted: by how much the text around a name counts in whitening beside all spread, how much the
    length of directions costs, and what a detector reads at least where it fires; less, though not below ``lowest``,
    where one would not fire at all of the texts that it was fitted to.
    """

    wording: float = 64.0
    ridge: float = 0.01
    fires: float = 0.35
    lowest: float = 0.1
    spare: float = 0.05


@dataclass(frozen=True)
class SubjectDetectors:
    """Detectors (s,) as ``directions`` (s, d) and ``offsets`` (s,): one fires where it reads more than 0.

    ``subject`` (e,) is the number of each edit's subject, or -1 for an edit without one.
    """

    directions: Tensor
    offsets: Tensor
    subject: Tensor

    def readings(self, states: Tensor) -> Tensor:
        """Return what detectors read of normed states (n, d): (n, s)."""
        return F.linear(states, self.directions, self.offsets)


@dataclass(frozen=True)
class NameStates:
    """States (m, d) at which no edit's subject ends, and ``strayed`` (n, d): by how much texts around made-up names
    move the states of their last tokens. ``sinks`` (k, d) are those of tokens that attention rests on, as on the first
    of a text, by their large norms; they are no ``others``. ``last`` and ``last_sinks`` are states behind the last
    layer: of some of the others, on other things than names, and of sinks.
    """

    others: Tensor
    strayed: Tensor
    sinks: Tensor
    last: Tensor
    last_sinks: Tensor


def subject_detectors(
    capture: StateCapture,
    edits: Sequence[Edit],
    names: NameStates,
    read: ReadTexts,
    settings: DetectorSettings = DetectorSettings(),
) -> SubjectDetectors:
    """Return detectors of edits' subjects; edits on the same name share one. An edit whose prompt does not name its
    subject is one without: no detector could fire there.
    """
    loaded, site = capture.loaded, capture.site
    known: dict[str, int] = {}
    named = [name_of(edit).casefold() for edit in edits]
    numbers = [known.setdefault(name, len(known)) if name else -1 for name in named]
    about = [(edit, number) for edit, number in zip(edits, numbers, strict=True) if number >= 0]
    texts = list(texts_on_edits(loaded.tokenizer, about))
    found = torch.tensor(sorted({text.subject for text in texts}), dtype=torch.long)
    place = torch.full((len(known) + 1,), -1).scatter(0, found, torch.arange(len(found)))
    subject = place[torch.tensor(numbers)]
    if not len(found):
        return SubjectDetectors(torch.empty(0, site.d), torch.empty(0), subject)
    of_text = read.numbers()
    states, elsewhere = _at_names(read.at_router, [of_text[text.tokens] for text in texts], texts, _OWN_TOKENS)
    with quick_products(loaded, site):
        behind, of_behind = _behind_others(capture, about)
        near = _near_names(capture, about)
    key = place[torch.cat([torch.tensor([text.subject for text in texts]), of_behind])]
    mean, turn = _whitening(names, settings)
    others = torch.cat([near, elsewhere, _inside_answers(read, edits), names.sinks, names.others])
    own, others = ((part - mean) @ turn for part in (torch.cat([states, behind]), others))
    directions, offsets = Separation(own, key, others, settings.ridge).solved()
    # Behind other texts a name reads less: that lowers no bar.
    plain, of_plain = own[: len(texts)], key[: len(texts)]
    least = torch.full_like(offsets, torch.inf).scatter_reduce(
        0, of_plain, (plain * directions[of_plain]).sum(1) + offsets[of_plain], "amin"
    )
    directions = directions @ turn.T
    fires = (least - settings.spare).clamp(min=settings.lowest, max=settings.fires)
    return SubjectDetectors(directions, offsets - directions @ mean - fires, subject)


def _behind_others(capture: StateCapture, edits: list[tuple[Edit, int]]) -> tuple[Tensor, Tensor]:
    """Return the states (n, d) of names' last tokens in prompts after other texts, and the subjects' numbers (n,)."""
    texts = list(texts_behind_others(capture.loaded.tokenizer, edits))
    states = capture.states_at([text.tokens for text in texts], [text.place for text in texts], "subjects")
    return states, torch.tensor([text.subject for text in texts], dtype=torch.long)


def _near_names(capture: StateCapture, edits: list[tuple[Edit, int]]) -> Tensor:
    """Return states (m, d) in texts on names that are nearly edits' subjects."""
    texts = list(texts_on_near_names(capture.loaded.tokenizer, edits))
    states = capture.text_states([text.tokens for text in texts], "subjects")
    return torch.cat(_at_names(states, range(len(texts)), texts))


def _inside_answers(read: ReadTexts, edits: Sequence[Edit]) -> Tensor:
    """Return states (m, d) inside the answers of edits, but for answers that name a subject."""
    names = {name.casefold() for edit in edits if (name := edit.subject_name)}
    free = [not any(name in edit.answer.casefold() for name in names) for edit in edits]
    ends = zip(read.texts, read.at_router.first.tolist(), read.at_router.first[1:].tolist(), strict=False)
    inside = [range(begin + len(text.row.prompt), end) for text, begin, end in ends if free[text.edit]]
    return read.at_router.normed[[place for places in inside for place in places]].float()


def name_states(capture: StateCapture, identity: str, *, share: float) -> NameStates:
    """Return what a base model makes of made-up names, or what the cache remembers.

    Args:
        identity: of the base model, for the cache.
        share: how much of the packaged names is read.
    """
    path, loaded = capture.cache_file("names", identity, share, _VERSION), capture.loaded
    try:
        kept = load_tensors(path)
        return _name_states(kept)
    except (DamagedFileError, KeyError):
        capture.on_progress(Event("made-up names"))
    texts, elsewhere = list(texts_on_names(loaded.tokenizer, share)), texts_on_other_things(loaded.tokenizer, share)
    early = [text for number, text in enumerate(elsewhere) if number % _EVERY]
    with quick_products(loaded, last_site(loaded, capture.site)):
        named = capture.text_states([text.tokens for text in texts], "made-up names")
        further = capture.text_states(early, "made-up names")
        both, last = capture.router_and_last(elsewhere[::_EVERY], "made-up names")
    own, others = _at_names(named, range(len(texts)), texts)
    sinks = _sinks(both)
    chosen, rests = _drawn((~sinks).nonzero()[:, 0], _LAST), sinks.nonzero()[:_SINKS, 0]
    early_chosen = _drawn((~_sinks(further)).nonzero()[:, 0], _ELSEWHERE - len(chosen))
    strayed = from_group_means(own, torch.tensor([text.subject for text in texts]))
    kept = {
        "others": torch.cat([own.half(), others.half(), further.normed[early_chosen], both.normed[chosen]]),
        "strayed": strayed.half(),
        "sinks": both.normed[rests],
        "last": last.normed[chosen],
        "last_sinks": last.normed[rests],
    }
    keep_in_cache(path, lambda working: save_tensors(working, kept))
    return _name_states(kept)


def _name_states(kept: Mapping[str, Tensor]) -> NameStates:
    return NameStates(*(kept[field.name].float() for field in fields(NameStates)))


def _at_names(
    states: TextStates, numbers: Sequence[int], texts: Sequence[SubjectText], most: int = _TOKENS
) -> tuple[Tensor, Tensor]:
    """Return the states of names' last tokens (n, d), and of some at which no name ends (m, d).

    Args:
        numbers: of the texts among those that were read.
        most: how many states are drawn inside names, and how many around them.
    """
    begins, sinks = states.first[torch.tensor(numbers)], _sinks(states)
    ends = begins + torch.tensor([text.place for text in texts])
    within, around = (
        torch.cat(
            [begin + torch.tensor(indices, dtype=torch.long) for begin, indices in zip(begins, each, strict=True)]
        )
        for each in ([text.within for text in texts], [text.around for text in texts])
    )
    chosen = torch.cat([_drawn(indices[~sinks[indices]], most) for indices in (within, around)])
    return states.normed[ends].float(), states.normed[chosen].float()


def _sinks(states: TextStates) -> Tensor:
    """Return which tokens (n,) attention rests on."""
    return states.inverse < _SINK * states.inverse.median()


def _drawn(numbers: Tensor, most: int) -> Tensor:
    """Return at most ``most`` of the numbers (n,), drawn at random."""
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))[:most]]


def _whitening(names: NameStates, settings: DetectorSettings) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) of states, and the root (d, d) of the inverse of how they spread."""
    mean = names.others.mean(0)
    spread = _evened(names.others - mean) + settings.wording * _evened(names.strayed)
    return mean, inverse_root(spread)


def _evened(rows: Tensor) -> Tensor:
    """Return the second moment (d, d) of rows (n, d), with 1 as its mean eigenvalue."""
    moment = rows.T @ rows
    return moment * (len(moment) / moment.trace().clamp(min=1e-12))
