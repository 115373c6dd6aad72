from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.byte_level import save_base
from support.loading import CPU

from wisecli.commands.checkpoint.export_stock import router_layer
from wisecli.export.stock.router import reader_training
from wisecli.export.stock.router.reader_rows import ReaderRow, RowKind, RowSettings
from wisecli.export.stock.router.reader_training import ReaderSettings, reader_key, relation_reader
from wisecli.export.stock.router.relation_reader import RelationReader
from wisecli.export.stock.text_states import Rotation, StateCapture, TextStates
from wisecli.io import packaged_weights
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.packaged_weights import packaged_file, save_packaged
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import Site, find_site, fingerprint
from wisecli.models.loading import Loaded, load_model
from wisecli.progress import Event, ignore_progress

LAYER = 1
SETTINGS = ReaderSettings(
    rows=RowSettings(facts=24, examples=4, longest=120, share=0.05),
    steps=60,
    rate=5e-3,
    facts=8,
    relations=6,
    held_back=4,
)
# Components of states that no reader reads.
NONE = torch.empty(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Site]:
    base = save_base(tmp_path_factory.mktemp("reader") / "base")
    return load_model(base, CPU), find_site(base, Checkpoint(base), LAYER)


def learned(model: tuple[Loaded, Site], identity: str, heard: list[Event]) -> RelationReader:
    return learned_by(model, identity, SETTINGS, heard)


def learned_by(
    model: tuple[Loaded, Site], identity: str, settings: ReaderSettings, heard: list[Event] | None = None
) -> RelationReader:
    capture = StateCapture(*model, ignore_progress if heard is None else heard.append)
    return relation_reader(capture, BaseIdentity(identity, identity), share=1.0, settings=settings)


def losses(heard: list[Event]) -> list[float]:
    return [float(event.note.removeprefix("loss ")) for event in heard if event.stage == "relations"]


def test_it_learns_the_same_each_time_and_once_alone(model: tuple[Loaded, Site]) -> None:
    heard: list[Event] = []
    first = learned(model, "one", heard)
    told = losses(heard)
    assert told[-1] < 0.7 * told[0]
    assert not first.training
    # Of another base model by its identity, so that nothing is cached.
    again = learned(model, "two", heard)
    kept: list[Event] = []
    cached = learned(model, "one", kept)
    assert not kept
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, cached.state_dict()[name])


def test_products_in_bfloat16_teach_much_the_same(model: tuple[Loaded, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    told, weights = [], []
    for quick in (False, True):
        monkeypatch.setattr(reader_training, "has_quick_bfloat16", partial(bool, quick))
        heard: list[Event] = []
        reader = learned(model, f"bfloat16 {quick}", heard)
        assert {one.dtype for one in reader.parameters()} == {torch.float32}
        told.append(losses(heard))
        weights.append(torch.cat([one.detach().flatten() for one in reader.parameters()]))
    exact, rounded = told
    assert not torch.equal(*weights)
    assert rounded[0] == pytest.approx(exact[0], rel=0.05)
    assert rounded[-1] < 0.7 * rounded[0]


def test_a_share_of_the_rows_takes_as_many_fewer_steps() -> None:
    some = ReaderSettings().of_share(0.5)
    assert (some.steps, some.rows.facts, some.rows.share) == (750, 200, 0.5)
    least = ReaderSettings().of_share(0.001)
    assert least.steps == 20
    assert least.rows.facts == 32


def test_its_sizes_fit_into_the_models_blocks(model: tuple[Loaded, Site]) -> None:
    sizes = reader_training._sizes(*model, SETTINGS)
    assert (sizes.hidden, sizes.groups, sizes.heads, sizes.head_dim) == (32, 2, 2, 8)
    assert sizes.neurons == 32
    assert sizes.components == 32


def test_other_settings_are_learned_anew(model: tuple[Loaded, Site]) -> None:
    quick = replace(SETTINGS, steps=20)
    one, other = (learned_by(model, "three", settings) for settings in (quick, replace(quick, rate=1e-3)))
    assert not torch.equal(one.output.weight, other.output.weight)


def test_prompts_are_read_behind_other_examples_up_to_so_many_tokens() -> None:
    rows = [
        ReaderRow((1,) * size, size, RowKind.EXAMPLE, 0, 0, asks) for size, asks in ((7, True), (9, False), (4, False))
    ]
    states = TextStates.empty([row.tokens for row in rows], 8)
    settings = replace(SETTINGS, behind=1.0, most_before=12)
    lessons = reader_training._Lessons(rows, states, NONE, Rotation(torch.ones(1), torch.ones(1), 1.0), settings)
    drawn = [list(lessons._before()) for _ in range(200)]
    counts = {sum(map(len, one)) for one in drawn}
    assert min(counts) >= 1
    assert max(counts) == 12
    # Of what asks and of what mentions, whose ends are all there.
    assert {int(part[-1]) for one in drawn for part in one} == {6, 15, 19}
    assert {int(token) for one in drawn for part in one for token in part} == set(range(20))
    never = replace(settings, behind=0.0)
    assert not list(reader_training._Lessons(rows, states, NONE, lessons._rotation, never)._before())


@pytest.mark.parametrize(("closed", "first"), [(3, 3), (0, 5), (8, 5)])
def test_a_row_is_looked_at_from_its_prompts_last_token_on_or_from_where_nothing_is_asked(
    closed: int, first: int
) -> None:
    rows = [ReaderRow((1,) * 8, 6, RowKind.EXAMPLE, 0, 0, False, closed)]
    states = TextStates.empty([row.tokens for row in rows], 8)
    lessons = reader_training._Lessons(rows, states, NONE, Rotation(torch.ones(1), torch.ones(1), 1.0), SETTINGS)
    columns = lessons._drawn([0] * 400).columns.tolist()
    assert set(columns) == set(range(first, 8))
    assert 0.4 < columns.count(5) / len(columns) < 0.8


def test_one_that_comes_with_the_package_is_taken(
    model: tuple[Loaded, Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = learned(model, "one", [])
    key = reader_key(BaseIdentity("", "four"), model[1], SETTINGS.of_share(1.0))
    save_packaged(tmp_path / "reader.safetensors", first.state_dict(), key)
    monkeypatch.setattr(packaged_weights, "PACKAGED", tmp_path)
    heard: list[Event] = []
    again = learned(model, "four", heard)
    assert not heard
    assert not again.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    learned(model, "five", heard)
    assert heard


def test_the_demo_model_needs_to_learn_nothing(real_model: Path) -> None:
    loaded, checkpoint = load_model(real_model, CPU), Checkpoint(real_model)
    site = router_layer(real_model, find_site(real_model, checkpoint))
    identity = BaseIdentity.of(checkpoint, fingerprint(real_model, checkpoint, site).config, loaded.tokenizer)
    assert packaged_file(reader_key(identity, site, ReaderSettings().of_share(1.0))) is not None
