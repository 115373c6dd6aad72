"""A written router, run by transformers, computes channel by channel what it is made of."""

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drawing import normal
from support.helpers import save_tiny
from support.tiny_models import TINY_CONFIGS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks
from wisecli.export.stock.router.answer_places import AnswerPlaces, GoingOn
from wisecli.export.stock.router.code_packing import packed_codes
from wisecli.export.stock.router.relation_reader import ReaderSizes, RelationReader
from wisecli.export.stock.router.router_blocks import Channels, Router, Scales, router_blocks
from wisecli.export.stock.router.subject_detectors import SubjectDetectors
from wisecli.export.stock.stock_checkpoint import base_settings, write_stock
from wisecli.export.stock.text_states import Rotation
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site

LAYER, HIDDEN, HEAD, CODE, EDITS = 2, 32, 16, 6, 5
# How large the router writes what it says, as shares of the length of states.
QUIET, LOUD, EDIT_SIZE = 1 / 4000, 1 / 400, 1 / 700
# Each token stands once, so that a name is named once.
TOKENS = torch.randperm(95, generator=torch.Generator().manual_seed(0)) + 2
ROWS = [tuple(row.tolist()) for row in TOKENS[:47].split([9, 14, 11, 13])]
# Places of names in all rows, one row behind the other.
NAMED = (2, 6, 12, 19, 28, 38)
# Layouts of heads: some groups of several, as many groups as heads, and more groups than a reader uses.
LAYOUTS = {
    "llama": ("llama", 4, 2),
    "granite": ("granite", 4, 2),
    "one group": ("llama", 4, 1),
    "as many groups as heads": ("llama", 4, 4),
    "four groups of four": ("llama", 16, 4),
}


@dataclass(frozen=True)
class Made:
    """A base model, its checkpoint with a router, the router, and of each of the rows normed states and factors behind
    the edited layer, and normed states behind the ``last``.
    """

    base: Path
    path: Path
    router: Router
    states: list[Tensor]
    inverse: list[Tensor]
    last: list[Tensor]
    rotation: Rotation
    blocks: AddedBlocks


def made(root: Path, layout: str, *, detectors: int = 6) -> Made:
    architecture, heads, groups = LAYOUTS[layout]
    config = deepcopy(TINY_CONFIGS[architecture])
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, groups, HEAD
    base = save_tiny(root / "base", architecture, config=config)
    # States so long that nothing of what stands in the extra channels changes their norm, and of one length: a norm
    # multiplies what stands there by another factor at each token.
    plain = AutoModelForCausalLM.from_pretrained(base)
    embedded = plain.get_input_embeddings().weight.data
    embedded *= 1e5 / embedded.norm(dim=1, keepdim=True)
    plain.save_pretrained(base)
    (states, inverse), (last, by_last) = (
        zip(*(normed(plain.eval(), layer, tokens) for tokens in ROWS), strict=True) for layer in (LAYER, -1)
    )
    router = random_router(torch.cat(states), torch.cat(inverse), groups, heads, detectors)
    cos, sin = plain.model.rotary_emb(torch.zeros(1), torch.arange(20)[None])
    scaling = float(plain.model.layers[LAYER].self_attn.scaling)
    scales = Scales(router.scales.router, float(torch.cat(by_last).median()), scaling)
    router = Router(**{**vars(router), "scales": scales})
    output, checkpoint, settings = root / "stock", Checkpoint(base), base_settings(base)
    output.mkdir()
    site = find_site(base, checkpoint, LAYER)
    blocks = router_blocks(router, settings)
    write_stock(output, base, checkpoint, site, blocks, Channels.of(router).count)
    return Made(
        base, output, router, list(states), list(inverse), list(last), Rotation(cos[0], sin[0], scaling), blocks
    )


@torch.no_grad()
def normed(model: Any, layer: int, tokens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Normed states that leave a layer, and what the norm multiplied them by."""
    hidden = leaving(model, [model.model.layers[layer]], tokens)[0]
    inverse = torch.rsqrt(hidden.square().mean(-1) + model.config.rms_norm_eps)
    return hidden * inverse[:, None], inverse


@torch.no_grad()
def random_router(states: Tensor, inverse: Tensor, groups: int, heads: int, detectors: int) -> Router:
    """Detectors, each of which fires at one of the states alone; random codes, and places that random states are at."""
    used, each = min(3, groups), min(3, heads // groups)
    torch.manual_seed(0)
    reader = RelationReader(ReaderSizes(HIDDEN, 12, 16, 10, used, each, HEAD, CODE)).eval()
    reader.fit_to(states, inverse)
    reader.output.weight *= 6
    # The first row names two subjects of edits, the second one and others.
    chosen = [*NAMED, *(number for number in range(len(states)) if number not in NAMED)]
    at = states[chosen[:detectors]]
    readings = at @ states.T / HIDDEN
    nearest = readings.masked_fill(readings > 0.999, -1.0).amax(1)
    directions = at / HIDDEN / (1 - nearest)[:, None]
    offsets = -(0.5 + nearest / 2) / (1 - nearest)
    relations = torch.nn.functional.normalize(normal(EDITS, CODE, seed=2), dim=-1)
    subject = torch.tensor([0, 1, 2, -1, -1])
    edit = torch.arange(EDITS).repeat_interleave(2)
    inside = 0.2 * normal(EDITS, HIDDEN + 1, seed=3) / HIDDEN**0.5
    going_on = GoingOn(inside, 0.2 * normal(HIDDEN + 1, seed=7) / HIDDEN**0.5 + torch.eye(HIDDEN + 1)[-1])
    ways, added = normal(10, HIDDEN, seed=4) / HIDDEN**0.5, 50 * normal(10, HIDDEN, seed=6)
    places = AnswerPlaces(edit, ways, 0.5 + normal(10, seed=5), added)
    thresholds = torch.tensor([-1.0, -2.0, -1.0, 0.3, -0.2])
    fires = SubjectDetectors(directions, offsets, subject)
    return Router(reader, relations, thresholds, fires, going_on, places, Scales(1 / float(reader.gain), 1.0, 1.0))


@torch.no_grad()
def behind(found: Made, tokens: tuple[int, ...]) -> list[Tensor]:
    """The stream (T, D) behind the edited layer and each block there, behind the last of the base's and each block."""
    layers = (model := AutoModelForCausalLM.from_pretrained(found.path).eval()).model.layers
    at_edited = layers[LAYER : LAYER + len(found.blocks.behind) + 1]
    return leaving(model, [*at_edited, *layers[-len(found.blocks.last) - 1 :]], tokens)


@torch.no_grad()
def leaving(model: Any, layers: Sequence[nn.Module], tokens: tuple[int, ...]) -> list[Tensor]:
    """The stream (T, D) that leaves some layers."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).reshape(len(tokens), -1))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        model(input_ids=torch.tensor([tokens]))
    return kept


def stepped(readings: Tensor, ramp: float) -> Tensor:
    """What steps give whose readings go from -ramp / 2, closed, to ramp / 2, open."""
    scaled = readings * (20 / ramp) + 10
    silu = torch.nn.functional.silu
    return (silu(scaled) - silu(scaled - 20)) / 20


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-6))


def of(found: Made, stream: Tensor, part: str) -> Tensor:
    share, scale = QUIET if part in ("features", "relation", "asked") else LOUD, found.router.scales.router
    if part in ("edit", "closes"):
        share, scale = EDIT_SIZE, found.router.scales.last
    return stream[:, Channels.of(found.router)[part]] / (share * HIDDEN**0.5 / scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_written_router_computes_what_it_says(tmp_path: Path, layout: str) -> None:
    made_one = made(tmp_path, layout)
    shares, groups = LAYOUTS[layout][1] // LAYOUTS[layout][2], LAYOUTS[layout][2]
    router, reader = made_one.router, made_one.router.reader
    names = packed_codes(len(router.detectors.offsets), Channels.of(router).size("name"))
    edits = packed_codes(EDITS, Channels.of(router).size("edit"))
    channels = names.shape[1]
    subjects, going_on = packed_codes(len(names), 2 * channels).split([channels, channels], 1)
    opened_once, named_once, placed_once = False, False, False
    of_rows = ROWS, made_one.states, made_one.inverse, made_one.last
    for tokens, states, inverse, at_last in zip(*of_rows, strict=True):
        stream = behind(made_one, tokens)
        last = stream[-1]
        # Detectors, and the reader's features.
        fired = stepped(router.detectors.readings(states), 0.1)
        assert apart(of(made_one, last, "name"), fired @ names) < 1e-3
        heads = min(8, min(4, shares) * groups)
        share_of = torch.nn.functional.one_hot(torch.arange(fired.shape[1]) % heads, 8).float()
        assert apart(of(made_one, last, "fired"), fired @ share_of) < 1e-3
        assert torch.equal(of(made_one, last, "constant"), torch.ones(len(tokens), 1))
        assert torch.equal(of(made_one, last, "closes"), torch.ones(len(tokens), 1))
        features = reader.token_features(states, inverse)
        written = of(made_one, last, "features") * (inverse * reader.gain)[:, None]
        assert apart(written, features[:, : reader.sizes.features]) < 1e-3
        # The relation so far, and whether it is asked, at every token.
        count = len(tokens)
        packed, mask = features.repeat(count, 1), torch.ones(count, count, dtype=torch.bool)
        relation, asked = reader.pooled(packed, mask, torch.arange(count), made_one.rotation)
        assert apart(of(made_one, last, "relation"), relation) < 1e-3
        assert apart(of(made_one, last, "asked")[:, 0], asked) < 1e-3
        # The subjects so far: all of them alike, wherever they stand.
        so_far = fired.cumsum(0)
        share = so_far / (so_far @ share_of @ share_of.T).clamp(min=1)
        subject, clear = (share > 0.6).float(), ((share - 0.6).abs() > 0.06).all(1)
        assert apart(of(made_one, last, "subject")[clear], (subject @ subjects)[clear]) < 1e-3
        left = of(made_one, last, "names") - ((share - subject) @ names + subject @ going_on)
        assert left[clear].abs().max() < 0.02
        named_once |= bool(subject.sum(1).max() > 1)
        # The edits that open.
        number = router.detectors.subject
        there = torch.where(number >= 0, subject[:, number.clamp(min=0)], 1.0)
        begun = states @ router.going_on.begun[:, :-1].T + router.going_on.begun[:, -1]
        ends = states @ router.going_on.ends[:-1] + router.going_on.ends[-1]
        odds = float(reader.kappa) * relation @ router.relations.T + asked[:, None] - router.thresholds
        odds = odds + 18 * (there - 1) + 8 * begun + 4 * (ends - 1)[:, None]
        opened = stepped(odds + 0.75, 2.0)
        assert clear.float().mean() > 0.7
        assert apart(of(made_one, last, "edit")[clear], (opened @ edits)[clear]) < 1e-3
        opened_once |= bool(opened.max() > 0.99)
        # And what they add to the stream.
        places = router.places
        readings = at_last @ places.directions.T + places.offsets - 0.5 + 8 * (opened[:, places.edit] - 1)
        residuals = stepped(readings, 0.2) @ places.added
        # An edit that is half open is that by a code whose rounding places make more of.
        clear &= ((opened - 0.5).abs() > 0.49).all(1)
        hidden = last[:, :HIDDEN] - stream[-1 - len(made_one.blocks.last)][:, :HIDDEN]
        assert (hidden - residuals)[clear].norm() < 1e-3 * residuals.norm()
        placed_once |= bool(residuals[clear].norm() > 1)
    assert opened_once
    assert named_once
    assert placed_once


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weight_is_larger_than_sixteen_bits_hold(tmp_path: Path, layout: str) -> None:
    found = made(tmp_path, layout)
    blocks = [*found.blocks.behind, *found.blocks.last]
    largest = max(float(tensor.abs().max()) for block in blocks for tensor in block.tensors.values())
    assert 20 < largest < torch.finfo(torch.float16).max


@torch.no_grad()
def test_base_channels_stay_until_an_edit_opens(tmp_path: Path) -> None:
    found = made(tmp_path, "llama")
    for tokens in ROWS:
        stream = behind(found, tokens)
        at_edited = len(found.blocks.behind) + 1
        for before in stream[1:at_edited]:
            assert torch.equal(before[:, :HIDDEN], stream[0][:, :HIDDEN])
        # So the layers above give what they do in the base model.
        above = stream[at_edited][:, :HIDDEN]
        normed_above = above * torch.rsqrt(above.square().mean(-1, keepdim=True))
        torch.testing.assert_close(normed_above, found.last[ROWS.index(tokens)], rtol=1e-3, atol=1e-4)
        assert torch.equal(stream[0][:, HIDDEN:], torch.zeros_like(stream[0][:, HIDDEN:]))


def count(found: Made) -> int:
    """How many blocks a router takes."""
    return len(found.blocks.behind) + len(found.blocks.last)


def test_detectors_that_do_not_fit_into_a_block_take_more(tmp_path: Path) -> None:
    # A block has 64 neurons, of which the first one's reader takes 16.
    assert count(made(tmp_path / "few", "llama", detectors=24)) == 4
    assert count(made(tmp_path / "many", "llama", detectors=32)) == 5


def test_channels_stand_side_by_side() -> None:
    channels = Channels(HIDDEN, 64, 48, 64)
    parts = (
        "features",
        "fired",
        "constant",
        "name",
        "names",
        "beside",
        "subject",
        "relation",
        "asked",
        "edit",
        "closes",
    )
    taken = [number for part in parts for number in range(channels[part].start, channels[part].stop)]
    assert taken == list(range(HIDDEN, HIDDEN + channels.count))
    assert channels.one("constant") == HIDDEN + 72
    assert channels.size("name") == 40
    assert Channels(HIDDEN, 64, 48, 8).size("name") == 7
