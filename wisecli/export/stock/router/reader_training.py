"""A relation reader, learned once a base model from made-up facts and packaged relations, and kept in the cache.

In each step some facts and relations stand against each other: pairs of a prompt and a relation's code are to open
exactly where the prompt asks that relation (binary cross entropy). Tokens are left out by chance.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from wisecli.environment import has_quick_bfloat16
from wisecli.errors import DamagedFileError
from wisecli.export.stock.router.reader_rows import ReaderRow, RowKind, RowSettings, reader_rows
from wisecli.export.stock.router.relation_reader import ReaderSizes, RelationReader
from wisecli.export.stock.text_states import Rotation, StateCapture, TextStates, rotation_of
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.packaged_weights import packaged_file
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.running.quick_products import quick_dropout, quick_products
from wisecli.models.running.seeding import seeded
from wisecli.progress import Event, ProgressCallback
from wisecli.routing.memories.calibration import quantile

_VERSION = 12
# Groups of keys and values that are used at most, and queries of each.
_GROUPS, _HEADS = 3, 3
# States by which principal components are found.
_LOOKED_AT = 20000
# So many facts are always made up.
_FEWEST = 32


@dataclass(frozen=True)
class ReaderSettings:
    """How a relation reader is learned: from ``rows``, in so many ``steps`` at a ``rate`` that rises and falls.

    A step takes ``facts``, each with ``own`` prompts in forms for its code and ``examples``, and ``relations`` in two
    wordings. A prompt and its own fact count ``own_weight``, one and all other facts together ``others``, or so many
    times that if it asks nothing: ``silent``. A share ``behind`` of prompts is read after others, of ``most_before``
    tokens at most. Up to a share ``left_out`` of tokens is dropped, and of features ``dropout``. One relation in so
    many is ``held_back``; of mentions of its facts a share ``let_through`` opens.
    """

    rows: RowSettings = field(default_factory=RowSettings)
    steps: int = 1500
    rate: float = 2e-3
    facts: int = 20
    own: int = 2
    examples: int = 5
    relations: int = 30
    own_weight: float = 3.0
    others: float = 6.0
    silent: float = 0.3
    left_out: float = 0.5
    behind: float = 0.3
    most_before: int = 450
    dropout: float = 0.1
    let_through: float = 0.08
    held_back: int = 10
    features: int = 64
    neurons: int = 256
    components: int = 192
    code: int = 48

    def of_share(self, share: float) -> ReaderSettings:
        """Return settings that read a share of the rows, and take as few steps."""
        facts = max(_FEWEST, round(self.rows.facts * share))
        rows = replace(self.rows, facts=facts, share=share)
        return replace(self, rows=rows, steps=max(20, round(self.steps * share)))


def relation_reader(
    capture: StateCapture, identity: BaseIdentity, *, share: float, settings: ReaderSettings = ReaderSettings()
) -> RelationReader:
    """Return the relation reader of a base model: as the cache or the package has it, or newly learned.

    Args:
        identity: of the base model.
        share: how much of the rows is read.
    """
    loaded, site, on_progress = capture.loaded, capture.site, capture.on_progress
    settings = settings.of_share(share)
    path = capture.cache_file("reader", identity.exact, repr(settings), _VERSION)
    sizes = _sizes(loaded, site, settings)
    for known in (path, packaged_file(reader_key(identity, site, settings))):
        if known is not None and known.exists():
            reader = RelationReader(sizes)
            with suppress(DamagedFileError, RuntimeError):
                reader.load_state_dict(load_tensors(known))
                return reader.eval()
    on_progress(Event("prompts to learn from"))
    with seeded(0, torch.device("cpu")):
        rows = reader_rows(loaded.tokenizer, settings.rows, random.Random(11))
        with quick_products(loaded, site):
            tokens = [row.tokens for row in rows]
            states = capture.text_states(tokens, "prompts to learn from")
        reader = RelationReader(sizes)
        sample = torch.randperm(len(states.normed))[:_LOOKED_AT]
        reader.fit_to(states.normed[sample].float(), states.inverse[sample])
        rotation = rotation_of(loaded, site, max(map(len, tokens)) + settings.most_before)
        _Lessons(rows, states, reader.components_of(states), rotation, settings).teach(reader, on_progress)
    keep_in_cache(path, lambda working: save_tensors(working, reader.state_dict()))
    return reader.eval()


def reader_key(identity: BaseIdentity, site: Site, settings: ReaderSettings) -> str:
    """Return by what a base model's reader of one layer is known in the package."""
    return sha256_json(["reader", identity.rounded, site.layer_module, repr(settings), _VERSION])


def _sizes(loaded: Loaded, site: Site, settings: ReaderSettings) -> ReaderSizes:
    """Return the sizes of a reader that fit the blocks of a model."""
    config = loaded.model.config
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    neurons = min(settings.neurons, int(config.intermediate_size) // 2)
    used, each = min(_GROUPS, groups), min(_HEADS, heads // groups)
    components = min(settings.components, site.d)
    return ReaderSizes(site.d, settings.features, neurons, components, used, each, head_dim, settings.code)


class _Batch(NamedTuple):
    """Rows by number, and at which column (B,) of each it is looked whether a relation is asked."""

    rows: list[int]
    columns: Tensor


class _Lessons:
    """Steps of learning, drawn by chance from rows, of whose tokens it has the states and their components (n, c)."""

    def __init__(
        self,
        rows: Sequence[ReaderRow],
        states: TextStates,
        components: Tensor,
        rotation: Rotation,
        settings: ReaderSettings,
    ) -> None:
        self._rows, self._states, self._rotation, self._settings = rows, states, rotation, settings
        self._components, self._rng = components, random.Random(0)
        groups: dict[RowKind, defaultdict[int, list[int]]] = {kind: defaultdict(list) for kind in RowKind}
        for index, row in enumerate(rows):
            groups[row.kind][row.relation if row.kind is RowKind.RELATION else row.fact].append(index)
        self._own, self._examples = groups[RowKind.OWN], groups[RowKind.EXAMPLE]
        usable = [fact for fact, found in self._own.items() if len(found) >= settings.own and self._examples[fact]]
        relation = {row.fact: row.relation for row in rows if row.kind is RowKind.OWN}
        self._held = [fact for fact in usable if relation[fact] % settings.held_back == 0]
        self._facts = [fact for fact in usable if relation[fact] % settings.held_back]
        self._before_others = [index for index, row in enumerate(rows) if row.kind is RowKind.EXAMPLE]
        told = groups[RowKind.RELATION].items()
        self._relations = {number: own for number, own in told if len(own) > 1 and number % settings.held_back}

    def teach(self, reader: RelationReader, on_progress: ProgressCallback) -> None:
        """Let a reader learn, and set its threshold by mentions of relations that it did not learn from."""
        settings = self._settings
        optimizer = torch.optim.AdamW(reader.parameters(), lr=settings.rate, weight_decay=0.01)
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=settings.rate, total_steps=settings.steps, pct_start=0.1
        )
        for step in range(settings.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=has_quick_bfloat16()):
                loss = self._loss(reader)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            rates.step()
            if step % 20 == 0 or step + 1 == settings.steps:
                on_progress(Event("relations", step + 1, settings.steps, note=f"loss {loss.item():.2f}"))
        reader.eval()
        with torch.no_grad():
            reader.threshold.add_(quantile(self._mentions(reader), 1 - settings.let_through))

    def _loss(self, reader: RelationReader) -> Tensor:
        """Return the mean loss of drawn prompts: whether each asks for the facts and relations drawn with it."""
        settings, rng, rows = self._settings, self._rng, self._rows
        facts = rng.sample(self._facts, min(settings.facts, len(self._facts)))
        numbers = rng.sample(list(self._relations), min(settings.relations, len(self._relations)))
        own = [index for fact in facts for index in rng.sample(self._own[fact], settings.own)]
        examples = [
            index
            for fact in facts
            for index in rng.sample(self._examples[fact], min(settings.examples, len(self._examples[fact])))
        ]
        pairs = [rng.sample(self._relations[number], 2) for number in numbers]
        firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
        codes, asked = self._read(reader, self._drawn([*own, *examples, *firsts, *seconds]))
        own_codes = codes[: len(own)].unflatten(0, (len(facts), settings.own)).mean(1)
        behind = len(own) + len(examples)
        relations = F.normalize(torch.cat([own_codes, codes[behind : behind + len(firsts)]]), dim=-1)
        keep = [*range(behind), *range(behind + len(firsts), len(codes))]
        prompts = [rows[index] for index in (*own, *examples, *seconds)]
        odds = reader.odds(codes[keep], asked[keep], relations)
        stand_for = [rows[index] for index in own[:: settings.own]] + [rows[index] for index in firsts]
        wanted, weights = _wanted(prompts, stand_for, settings)
        return (F.binary_cross_entropy_with_logits(odds, wanted, reduction="none") * weights).sum() / len(prompts)

    def _mentions(self, reader: RelationReader) -> Tensor:
        """Return how far mentions (n,) of facts of held back relations open, in log odds."""
        found = []
        for fact in self._held:
            mentions = [index for index in self._examples[fact] if not self._rows[index].asks]
            if not mentions:
                continue
            codes, _ = self._read(reader, self._ends(self._own[fact]))
            own, asked = self._read(reader, self._ends(mentions))
            found.append(reader.odds(own, asked, F.normalize(codes.mean(0, keepdim=True), dim=-1))[:, 0])
        return torch.cat(found or [torch.zeros(1)])

    def _ends(self, rows: list[int]) -> _Batch:
        """Return rows at their prompts' last tokens."""
        return _Batch(rows, torch.tensor([self._rows[index].prompt - 1 for index in rows]))

    def _drawn(self, rows: list[int]) -> _Batch:
        """Return rows at their prompts' last tokens, or by chance anywhere in the answers or where nothing is asked."""
        columns = []
        for index in rows:
            row = self._rows[index]
            last = row.prompt - 1
            begin = min(row.closed or last, last)
            columns.append(last if self._rng.random() < 0.5 else self._rng.randrange(begin, len(row.tokens)))
        return _Batch(rows, torch.tensor(columns))

    def _read(self, reader: RelationReader, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Return codes (B, c) and whether anything is asked (B,) of rows; while it learns, after other rows now and
        then, and without some tokens.
        """
        settings, states = self._settings, self._states
        begins = states.first[batch.rows].tolist()
        tokens = [
            torch.arange(begin, begin + column + 1)
            for begin, column in zip(begins, batch.columns.tolist(), strict=True)
        ]
        if reader.training:
            tokens = [torch.cat([*self._before(), own]) for own in tokens]
        columns = torch.tensor([len(own) - 1 for own in tokens])
        index = pad_sequence(tokens, batch_first=True)
        places = torch.arange(index.shape[1])
        mask = places <= columns[:, None]
        if reader.training:
            dropped = torch.rand(mask.shape) < settings.left_out * torch.rand(len(mask), 1)
            mask = mask & ~(dropped & (places != columns[:, None]))
        read = self._features(reader, index[mask])
        if reader.training:
            read = quick_dropout(read, settings.dropout)
        return reader.pooled(read, mask, columns, self._rotation)

    def _features(self, reader: RelationReader, tokens: Tensor) -> Tensor:
        """Return the features (n, f) of tokens (n,) by number."""
        learned = reader.learned_features(*self._states.at(tokens))
        return torch.cat([learned, self._components[tokens]], -1)

    def _before(self) -> Iterator[Tensor]:
        """Yield the tokens of prompts, drawn by chance, that a row is read after; of none as a rule."""
        settings, rng = self._settings, self._rng
        left = rng.randint(1, settings.most_before) if rng.random() < settings.behind else 0
        while left > 0:
            before = self._states.of(rng.choice(self._before_others))
            yield torch.arange(max(before.start, before.stop - left), before.stop)
            left -= before.stop - before.start


def _wanted(
    prompts: Sequence[ReaderRow], stand_for: Sequence[ReaderRow], settings: ReaderSettings
) -> tuple[Tensor, Tensor]:
    """Return whether prompts should open relations (n, e), and how much that counts (n, e)."""
    asks = torch.tensor([row.asks for row in prompts])[:, None]
    relation = torch.tensor([row.relation for row in prompts])[:, None] == torch.tensor([r.relation for r in stand_for])
    fact = torch.tensor([row.fact for row in prompts])[:, None] == torch.tensor([one.fact for one in stand_for])
    own_pair = torch.where(torch.tensor([[row.fact < 0] for row in prompts]), relation, fact)
    others = torch.where(asks, settings.others, settings.others * settings.silent) / len(stand_for)
    weights = torch.where(own_pair, settings.own_weight, others)
    # Whether a prompt that does not ask its own fact asks another's of the same relation is not known.
    return (relation & asks).float(), weights.masked_fill(relation & ~own_pair & ~asks, 0.0)
