"""A router as decoder blocks of Llama's kind, between channels that only they read and write.

Behind the router's layer stand, in this order, blocks that leave the base's own channels as they are::

    features    ε W₂ silu(W₁ u + b₁), and for each subject whose name ends here its code
    subjects    attention: the codes of all names so far; feed-forward: the code of each subject that is among them
    matches     attention: the code r of the relation, and whether it is asked;
                feed-forward: an edit opens where  κ r·ρ + a - τ + M (s·c - 1)  and what planes read of an answer that
                begins here or goes on are above 0 together, and writes its code

And behind the last layer, so that no token sees what was added at another::

    places      what an open edit adds at this token: a direction reads the place in its answer

A *step* is a pair of neurons, ``(silu(z) - silu(z - WIDTH)) / WIDTH``, which is 0 well below its threshold and 1 well
above it. What is compared with a threshold in extra channels is compared with a constant channel there, as a norm
divides both alike; where it divides by so much that all of them read as zero, steps are closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks, DecoderBlock, LayerSizes
from wisecli.export.stock.checkpoint.widening import Widening
from wisecli.export.stock.router.answer_places import AnswerPlaces, GoingOn
from wisecli.export.stock.router.block_tensors import WIDTH, Steps, attention, feed_forwards
from wisecli.export.stock.router.code_packing import coherence, packed_codes
from wisecli.export.stock.router.relation_reader import RelationReader
from wisecli.export.stock.router.subject_detectors import SubjectDetectors

# How large features and relations are in the stream, as shares of how long its states are; and codes and the constant,
# which are one number or seldom there: so large that the weights that read them fit into 16 bits.
_QUIET, _LOUD = 1 / 4000, 1 / 400
# How large edits' codes are, as a share of how long states are behind the last layer, where they are read.
_EDIT_SIZE = 1 / 700
# Channels of subjects' and of edits' codes.
_SUBJECT, _EDIT = 40, 44
# Subjects are looked for by so many heads at most, each its share of them; so many of a group of queries at most.
_FIRED, _OF_GROUP = 8, 4
# A subject is among the names if it has this share of their codes, or a little more than codes have of each other.
_AMONG, _BEYOND, _SURELY = 0.6, 0.1, 0.7
# From closed to open: readings of detectors, shares, log odds (wide, as bfloat16 holds only steps that are not far
# surpassed, and open a little above 0), readings of places; scores by which a name is looked at.
_FIRE_RAMP, _AMONG_RAMP, _ODDS_RAMP, _OPEN, _PLACE_RAMP, _ATTENDED = 0.1, 0.1, 2.0, 1.75, 0.2, 20.0
# Log odds that a missing subject takes away, that a begun answer adds, and that tokens take away which end no prompt;
# readings that a closed edit takes from its places.
_MISSING, _BEGUN, _ENDS, _CLOSED = 18.0, 4.0, 4.0, 8.0


class Scales(NamedTuple):
    """What a norm multiplies states by, as a rule, behind the ``router``'s layer and behind the ``last``; and what
    ``attention`` multiplies scores by.
    """

    router: float
    last: float
    attention: float


@dataclass(frozen=True)
class Router:
    """A memory's router: a ``reader`` of relations and the code of each edit's (e, c), ``thresholds`` (e,) in log odds,
    detectors of subjects, planes of answers that begin or go on, their places, and how large the base's numbers are.
    """

    reader: RelationReader
    relations: Tensor
    thresholds: Tensor
    detectors: SubjectDetectors
    going_on: GoingOn
    places: AnswerPlaces
    scales: Scales


class Channels:
    """Where the extra channels of a router are, by what stands in them: tokens' ``features``, which share of detectors
    ``fired`` and the code of the ``name`` that ends here, a ``constant``; the codes of all ``names`` so far and the
    constant ``beside`` them, the code of the ``subject``, which goes on in the channels of names; the ``relation`` and
    whether it is ``asked``; the ``edit``, and a constant that ``closes`` it.
    """

    def __init__(self, hidden: int, features: int, relation: int, head_dim: int) -> None:
        name = min(_SUBJECT, head_dim - 1)
        sizes = {
            **{"features": features, "fired": _FIRED, "constant": 1, "name": name, "names": name, "beside": 1},
            **{"subject": name, "relation": relation, "asked": 1, "edit": _EDIT, "closes": 1},
        }
        self.hidden, self._parts, begin = hidden, dict[str, slice](), hidden
        for part, size in sizes.items():
            self._parts[part] = slice(begin, begin + size)
            begin += size
        self.count = begin - hidden

    @classmethod
    def of(cls, router: Router) -> Channels:
        """Return the channels that a router takes."""
        sizes = router.reader.sizes
        return cls(sizes.hidden, sizes.features, sizes.code, sizes.head_dim)

    def __getitem__(self, part: str) -> slice:
        return self._parts[part]

    def of_subjects(self) -> list[int]:
        """Return the channels of subjects' codes."""
        return [number for part in ("subject", "names") for number in range(self.hidden + self.count)[self[part]]]

    def one(self, part: str) -> int:
        """Return the number of the channel in which a single number stands."""
        return int(self._parts[part].start)

    def size(self, part: str) -> int:
        """Return how many channels a part has."""
        return int(self._parts[part].stop - self._parts[part].start)


def router_blocks(router: Router, config: Mapping[str, Any]) -> AddedBlocks:
    """Return a router's blocks.

    Args:
        config: the base model's settings.
    """
    widening = Widening.of(config, Channels.of(router).count)
    sizes = LayerSizes.of({**config, "hidden_size": widening.width, "head_dim": router.reader.sizes.head_dim})
    writer = _Writer(router, sizes, widening)
    subjects, matches = (list(feed_forwards(sizes, steps)) for steps in (writer.subjects(), writer.matches()))
    subjects[0] |= writer.names_pooled()
    matches[0] |= writer.relation_pooled()
    parts = [*writer.features(), *subjects, *matches], feed_forwards(sizes, writer.places())
    return AddedBlocks(*([DecoderBlock(tensors) for tensors in part] for part in parts))


class _Writer:
    """Writes a router's parts as what blocks read and add."""

    def __init__(self, router: Router, sizes: LayerSizes, widening: Widening) -> None:
        self._router, self._sizes, self._width = router, sizes, widening.width
        self._channels = Channels.of(router)
        # What the norm of a wide stream multiplies extra channels by, as a rule.
        self._factor, self._last = (norm / math.sqrt(widening.share) for norm in router.scales[:2])
        length = math.sqrt(self._channels.hidden) / router.scales.router
        self._quiet, self._loud = _QUIET * length, _LOUD * length
        self._edit_size = _EDIT_SIZE * math.sqrt(self._channels.hidden) / router.scales.last
        # Heads that look for subjects, by their places in groups of queries.
        self._a_group = sizes.queries // sizes.shared
        self._of_group = min(_OF_GROUP, self._a_group)
        self._heads = min(_FIRED, self._of_group * (sizes.shared // router.reader.sizes.head_dim))
        self._names = packed_codes(len(router.detectors.offsets), self._channels.size("name"))
        self._subjects = packed_codes(len(self._names), len(self._channels.of_subjects()))
        self._edits = packed_codes(len(router.relations), self._channels.size("edit"))

    def _rows(self, count: int) -> Tensor:
        return torch.zeros(count, self._width)

    def features(self) -> Iterator[dict[str, Tensor]]:
        """Yield the feed-forwards of features and detectors."""
        router, channels = self._router, self._channels
        reader, detectors = router.reader, router.detectors
        reads, adds = self._rows(len(detectors.offsets)), self._rows(len(detectors.offsets))
        reads[:, : channels.hidden] = detectors.directions * (WIDTH / _FIRE_RAMP)
        adds[:, channels["name"]] = self._names * self._loud
        adds[number := torch.arange(len(adds)), channels.one("fired") + number % self._heads] = self._loud
        steps = Steps(reads, detectors.offsets * (WIDTH / _FIRE_RAMP) + WIDTH / 2, adds)
        count = reader.sizes.neurons
        blocks = list(feed_forwards(self._sizes, steps, first=count))
        first = blocks[0]
        first["mlp.gate_proj.weight"][:count, : channels.hidden] = reader.neurons.weight.detach()
        first["mlp.gate_proj.bias"][:count] = reader.neurons.bias.detach()
        first["mlp.up_proj.bias"][:count] = 1
        first["mlp.down_proj.weight"][channels["features"], :count] = reader.features.weight.detach() * self._quiet
        first["mlp.down_proj.bias"] = torch.zeros(self._width)
        first["mlp.down_proj.bias"][channels.one("constant")] = self._loud
        first["mlp.down_proj.bias"][channels.one("closes")] = self._edit_size
        yield from blocks

    def names_pooled(self) -> dict[str, Tensor]:
        """Return the attention of which each head is the mean of the codes of its share of all names so far."""
        channels, size, read = self._channels, self._router.reader.sizes.head_dim, self._factor * self._loud
        query, key = torch.zeros(self._sizes.queries), self._rows(self._sizes.shared)
        value, output = self._rows(self._sizes.shared), torch.zeros(self._width, self._sizes.queries)
        codes = channels.size("name")
        for head in range(self._heads):
            group, place = divmod(head, self._of_group)
            # The last pairs that a model rotates turn so slowly that a name counts alike wherever it stands.
            slow, begin = size // 2 - 1 - place, (group * self._a_group + place) * size
            query[begin + slow] = _ATTENDED / self._router.scales.attention
            # Where only another head's names end it looks away, or its mean would hold their codes as well.
            key[group * size + slow, channels["fired"]] = -0.5 / read
            key[group * size + slow, channels.one("fired") + head] = 1 / read
            value[group * size : group * size + codes, channels["name"]] = torch.eye(codes) / read
            value[group * size + codes, channels.one("constant")] = 1 / read
            output[channels["names"], begin : begin + codes] = torch.eye(codes) * self._loud
        output[channels.one("beside"), codes] = self._loud
        return attention(query, key, torch.zeros(self._sizes.shared), value, torch.zeros(self._sizes.shared), output)

    def subjects(self) -> Steps:
        """Return the steps that write the code of each subject that is among the names."""
        channels = self._channels
        reads, adds = self._rows(len(self._names)), self._rows(len(self._names))
        reads[:, channels["names"]] = self._names
        reads[:, channels.one("beside")] = -min(_SURELY, max(_AMONG, coherence(self._names) + _BEYOND))
        reads[:, channels.one("constant")] = _AMONG_RAMP / 2
        # A subject that is found takes its name's code out of these channels: what remains is of names that were not.
        adds[:, channels["names"]] = -self._names * self._loud
        adds[:, channels.of_subjects()] += self._subjects * self._loud
        return Steps(reads * self._steepness(_AMONG_RAMP), torch.zeros(len(reads)), adds)

    def relation_pooled(self) -> dict[str, Tensor]:
        """Return the attention of the relation reader."""
        channels, reader = self._channels, self._router.reader
        sizes, shared = reader.sizes, self._sizes.shared
        wide, size, hidden = sizes.groups * sizes.head_dim, sizes.head_dim, channels.hidden
        # The reader's features are multiplied by its gain, and the stream's by how large they are written.
        scale = float(reader.gain) * self._router.scales.router / (self._factor * self._quiet)
        parts = []
        for matrix in (reader.keys, reader.values):
            weight, of_components = matrix.weight.detach().split([sizes.features, sizes.components], 1)
            reads, offsets = self._rows(shared), torch.zeros(shared)
            reads[:wide, channels["features"]] = weight * scale
            reads[:wide, :hidden] = of_components @ reader.components.T
            offsets[:wide] = -reads[:wide, :hidden] @ reader.mean
            parts += [reads, offsets]
        parts[1][:wide] += reader.keys.bias.detach()
        queries, output = torch.zeros(self._sizes.queries), torch.zeros(self._width, self._sizes.queries)
        pooled = reader.output.weight.detach() * self._quiet
        for group in range(sizes.groups):
            for head in range(sizes.heads):
                begin = (group * (self._sizes.queries // shared) + head) * size
                part = slice((group * sizes.heads + head) * size, (group * sizes.heads + head + 1) * size)
                queries[begin : begin + size] = reader.queries[group, head].detach()
                output[channels["relation"], begin : begin + size] = pooled[:-1, part]
                output[channels.one("asked"), begin : begin + size] = pooled[-1, part]
        keys, key_offsets, values, value_offsets = parts
        return attention(queries, keys, key_offsets, values, value_offsets, output)

    def matches(self) -> Steps:
        """Return the steps that open edits: one for each."""
        router, channels = self._router, self._channels
        named = router.detectors.subject >= 0
        reads, adds = self._rows(len(named)), self._rows(len(named))
        reads[:, channels["relation"]] = (
            float(router.reader.kappa.detach()) * router.relations * (self._loud / self._quiet)
        )
        reads[:, channels.one("asked")] = self._loud / self._quiet
        missing = _MISSING / (1 - coherence(self._subjects))
        codes = self._rows(len(self._names))
        codes[:, channels.of_subjects()] = missing * self._subjects
        reads[named] += codes[router.detectors.subject[named]]
        reads[:, channels.one("constant")] = _OPEN - router.thresholds - missing * named
        adds[:, channels["edit"]] = self._edits * self._edit_size
        reads *= self._steepness(_ODDS_RAMP)
        answers = router.going_on
        begun = answers.begun * (_BEGUN + _ENDS) + answers.ends * _ENDS
        begun[:, -1] -= _ENDS
        begun *= WIDTH / _ODDS_RAMP
        reads[:, : channels.hidden] = begun[:, :-1]
        return Steps(reads, begun[:, -1], adds)

    def places(self) -> Steps:
        """Return the steps that add what open edits say."""
        places, channels = self._router.places, self._channels
        reads, adds = self._rows(len(places.edit)), self._rows(len(places.edit))
        reads[:, : channels.hidden] = places.directions * (WIDTH / _PLACE_RAMP)
        closed = WIDTH / (_PLACE_RAMP * self._last * self._edit_size) * _CLOSED / (1 - coherence(self._edits))
        reads[:, channels["edit"]] = closed * self._edits[places.edit]
        reads[:, channels.one("closes")] = -closed
        adds[:, : channels.hidden] = places.added
        return Steps(reads, (places.offsets - 0.5) * (WIDTH / _PLACE_RAMP) + WIDTH / 2, adds)

    def _steepness(self, ramp: float) -> float:
        """Return by what readings of extra channels are multiplied to go from closed to open within a ramp."""
        return WIDTH / (ramp * self._factor * self._loud)
