import dataclasses
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.drawing import normal
from support.helpers import keys_of, save_tiny, site_of
from support.loading import CPU
from torch import Tensor

from wisecli.artifacts.background_stats import BackgroundStats, load_background, save_background
from wisecli.data.corpus import reworded_facts, unrelated_texts
from wisecli.editing.background.background_activations import _median_length, measure_background
from wisecli.editing.background.key_capture import keys_of_texts
from wisecli.editing.examples.context_prefixes import continuations
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import save_tensors
from wisecli.io.digest import sha256_file
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.prompt_forms import Form, forms
from wisecli.models.running import quick_products
from wisecli.progress import Event
from wisecli.routing.memories.whitening import Moment, Whitening, leading, whitening

SHRINKAGE = 0.1


def skewed_keys(count: int, d_ff: int) -> Tensor:
    """Keys with a mean and with directions of very unlike variance."""
    spread = torch.diag(torch.linspace(0.2, 3.0, d_ff)) @ torch.linalg.qr(normal(d_ff, d_ff))[0]
    keys: Tensor = normal(count, d_ff, seed=1) @ spread + torch.linspace(-1, 1, d_ff)
    return keys


def moment_of(keys: Tensor, rank: int = 1000) -> Moment:
    return leading(keys / len(keys) ** 0.5, rank)


def dense_by_numpy(keys: Tensor) -> Tensor:
    wide = keys.double().numpy()
    found: Tensor = torch.from_numpy(
        sum((np.outer(key, key) for key in wide), np.zeros((wide.shape[1],) * 2)) / len(wide)
    )
    return found


# --- moments ---


@pytest.mark.parametrize(("count", "d_ff"), [(200, 12), (12, 12), (13, 12), (11, 12), (9, 40)])
def test_a_moment_keeps_eigenvalues_and_directions(count: int, d_ff: int) -> None:
    keys = skewed_keys(count, d_ff)
    found, expected = moment_of(keys), dense_by_numpy(keys)
    eigenvalues, eigenvectors = torch.linalg.eigh(expected)
    rank = min(count, d_ff)
    assert found.variances.shape == (rank,)
    assert found.directions.shape == (rank, d_ff)
    assert torch.allclose(found.variances.double(), eigenvalues.flip(0)[:rank], rtol=1e-3, atol=1e-4)
    assert torch.allclose(found.directions @ found.directions.T, torch.eye(rank), atol=1e-3)
    aligned = (found.directions.double() * eigenvectors.T.flip(0)[:rank]).sum(-1).abs()
    assert float(aligned.min()) > 0.999
    assert torch.allclose(found.energy.double(), expected.trace().reshape(1), rtol=1e-5)
    assert torch.allclose(found.dense().double(), expected, atol=2e-3)


@pytest.mark.parametrize("count", [60, 8])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_lower_rank_keeps_the_leading_directions(count: int, rank: int) -> None:
    keys = skewed_keys(count, 20)
    whole, part = moment_of(keys, 100), moment_of(keys, rank)
    assert torch.allclose(part.variances, whole.variances[:rank])
    assert torch.allclose(part.directions, whole.directions[:rank], atol=1e-6)
    assert torch.equal(part.energy, whole.energy)
    assert bool((whole.variances.diff() <= 0).all())


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_what_the_leading_part_leaves_is_spread_evenly(rank: int) -> None:
    keys = skewed_keys(300, 20)
    values, vectors = torch.linalg.eigh(dense_by_numpy(keys))
    values[: 20 - rank] = values[: 20 - rank].mean()
    expected = vectors @ torch.diag(values) @ vectors.T
    assert torch.allclose(moment_of(keys, rank).dense().double(), expected, atol=2e-3)
    some = torch.tensor([3, 0, 5])
    assert torch.allclose(moment_of(keys, rank).dense(some).double(), expected[some][:, some], atol=2e-3)


def test_a_moment_of_many_long_rows_is_close_to_the_exact_one() -> None:
    # Both sides above the limit of exact decompositions: a few strong directions in faint noise.
    strong = torch.linalg.qr(normal(4200, 3))[0].T
    sizes = torch.tensor([9.0, 5.0, 2.0])
    rows = torch.linalg.qr(normal(4100, 3, seed=1))[0] @ torch.diag(sizes) @ strong + 1e-4 * normal(4100, 4200, seed=2)
    before = torch.get_rng_state()
    found = leading(rows, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(found.variances, sizes.square(), rtol=1e-2)
    assert float((found.directions * strong).sum(-1).abs().min()) > 0.999
    assert torch.equal(leading(rows, 3).directions, found.directions)


# --- whitening ---


def apart_from_scale(matrix: Tensor) -> Tensor:
    return matrix.double() / matrix.double().trace()


@pytest.mark.parametrize(("count", "d_ff"), [(300, 3), (300, 16), (300, 40), (12, 30)])
def test_full_whitening_is_the_inverse_of_the_shrunk_second_moment(count: int, d_ff: int) -> None:
    keys = skewed_keys(count, d_ff)
    found = whitening(moment_of(keys)).apply(torch.eye(d_ff))
    moments = dense_by_numpy(keys)
    expected = torch.linalg.inv(moments + SHRINKAGE * moments.trace() / d_ff * torch.eye(d_ff))
    assert torch.allclose(apart_from_scale(found), apart_from_scale(expected), atol=1e-4)


@pytest.mark.parametrize(("size", "rank"), [(20, 1), (20, 5), (20, 19), (300, None)])
def test_whitening_takes_what_its_rank_leaves_as_even(size: int, rank: int | None) -> None:
    keys = skewed_keys(size + 280 if rank else 400, size)
    white = whitening(moment_of(keys) if rank is None else moment_of(keys, rank))
    used = 256 if rank is None else rank
    assert (len(white.directions), len(white.gains)) == (used, used)
    values, vectors = torch.linalg.eigh(dense_by_numpy(keys))
    even = values.clone()
    even[: size - used] = values[: size - used].mean()
    expected = vectors @ torch.diag(1 / (even + SHRINKAGE * values.mean())) @ vectors.T
    found = apart_from_scale(white.apply(torch.eye(size))) * size
    assert torch.allclose(found, apart_from_scale(expected) * size, atol=1e-3 if rank is None else size * 1e-5)


def test_even_text_is_left_as_it_is() -> None:
    white = whitening(Moment(torch.full((4,), 2.0), torch.eye(6)[:4], torch.tensor([12.0])))
    found = white.apply(torch.eye(6))
    assert torch.allclose(found, float(found[0, 0]) * torch.eye(6), atol=1e-6)


@pytest.mark.parametrize("leading_axes", [(), (3,), (2, 3)])
def test_whitening_is_applied_along_the_last_axis(leading_axes: tuple[int, ...]) -> None:
    white = whitening(moment_of(skewed_keys(50, 8), 5))
    matrix = white.floor * torch.eye(8) + white.directions.T @ torch.diag(white.gains) @ white.directions
    keys = normal(*leading_axes, 8, seed=6)
    assert torch.allclose(white.apply(keys), keys @ matrix, atol=1e-5)


def cosines_by_loop(white: Whitening, first: Tensor, second: Tensor) -> Tensor:
    even = white.floor * torch.eye(first.shape[1])
    matrix = (even + white.directions.T @ torch.diag(white.gains) @ white.directions).double()

    def cosine(one: Tensor, other: Tensor) -> float:
        return float(one @ matrix @ other / (one @ matrix @ one).sqrt() / (other @ matrix @ other).sqrt())

    return torch.tensor([[cosine(one, other) for other in second.double()] for one in first.double()])


def test_whitened_cosines_are_those_of_a_loop() -> None:
    white = whitening(moment_of(skewed_keys(50, 8), 5))
    first, second = normal(4, 8, seed=6), normal(7, 8, seed=7)
    assert torch.allclose(white.cosines(first, second), cosines_by_loop(white, first, second), atol=1e-5)
    assert torch.allclose(white.cosines(first, 3 * first).diagonal(), torch.ones(4), atol=1e-5)
    lengths = (white.whitened_keys(second) * second).sum(-1)
    assert torch.allclose(lengths.square(), (white.apply(second) * second).sum(-1), rtol=1e-4)


def made_up_facts(facts: int, ways: int, d_ff: int, *, seed: int) -> Tensor:
    """Keys (facts, ways, d_ff): what is asked, and much stronger the wording, in a few directions of its own."""
    axes = torch.linalg.qr(normal(d_ff, d_ff, seed=100))[0]
    asked = normal(facts, 1, d_ff - 6, seed=seed) @ axes[6:]
    worded = 4 * normal(facts, ways, 6, seed=seed + 1) @ axes[:6]
    keys: Tensor = asked + worded + 0.1 * normal(facts, ways, d_ff, seed=seed + 2)
    return keys


def test_rewordings_of_a_fact_come_closer_under_the_moment_of_wording() -> None:
    def even(keys: Tensor) -> Tensor:
        return keys * float((keys.shape[1] / keys.square().sum()).sqrt())

    seen, d_ff = made_up_facts(40, 5, 24, seed=1), 24
    plain = whitening(leading(even(seen.flatten(0, 1))))
    strayed = (seen - seen.mean(1, keepdim=True)).flatten(0, 1)
    wording = whitening(leading(torch.cat([even(seen.flatten(0, 1)), even(strayed) * 8**0.5])))
    unseen = made_up_facts(30, 4, d_ff, seed=50)
    margins = []
    for white in (plain, wording):
        near = [cosines_by_loop(white, fact[:1], fact[1:]).mean() for fact in unseen]
        firsts = unseen[:, 0]
        far = cosines_by_loop(white, firsts, firsts)[~torch.eye(30, dtype=torch.bool)].abs().mean()
        margins.append((float(torch.stack(near).mean()), float(far)))
    (near_plain, _), (near_wording, far_wording) = margins
    assert near_wording > near_plain + 0.1
    assert near_wording > far_wording + 0.4


# --- measuring a model ---


TEXTS = 130
# Of them the model goes on with a fifth.
CONTINUED = -(-TEXTS // 5)


@dataclasses.dataclass(frozen=True)
class Subject:
    loaded: Loaded
    measure: Callable[..., BackgroundStats]
    cache: Path
    events: list[Event]


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A tiny model, how it is measured, and what was told meanwhile; the cache is its own, and products are exact."""
    monkeypatch.setattr(quick_products, "has_quick_bfloat16", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load_model(save_tiny(tmp_path / "base"), load=CPU)
    site = site_of(loaded.model, 2)
    events: list[Event] = []

    def run(**changed: object) -> BackgroundStats:
        events.clear()
        matrix = loaded.model.get_parameter(site.weight)
        settings = {"texts": TEXTS, "chat": False, "batch_size": 16, "seed": 0, "on_progress": events.append} | changed
        identity = settings.pop("identity", "a model")
        return measure_background(loaded, site, lambda keys: keys @ matrix.T, identity, **settings)  # type: ignore[arg-type]

    return Subject(loaded, run, tmp_path / "cache" / "wise" / "unrelated", events)


def tensors_of(unrelated: BackgroundStats) -> dict[str, Tensor]:
    found = {name: getattr(unrelated, name) for name in ("keys", "chat", "median_output_norm", "writer_keys")}
    for name in ("tokens", "wording"):
        moment = getattr(unrelated, name)
        found |= {f"{name}.{field.name}": getattr(moment, field.name) for field in dataclasses.fields(Moment)}
    return found


def same_bits(first: BackgroundStats, second: BackgroundStats) -> bool:
    pairs = zip(tensors_of(first).values(), tensors_of(second).values(), strict=True)
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


def test_a_model_is_measured_as_one_text_after_the_other_says(subject: Subject) -> None:
    found, (model, tokenizer) = subject.measure(), (subject.loaded.model, subject.loaded.tokenizer)
    site = site_of(model, 2)

    def read(text: str) -> Tensor:
        return keys_of(model, site, tokenizer(text)["input_ids"])

    prompts = unrelated_texts(TEXTS, seed=0)
    spoken = continuations(model, tokenizer, prompts[:CONTINUED], tokens=12, seed=0)
    texts = [read(text) for text in [*spoken, *prompts[CONTINUED:]]]
    every = torch.cat(texts)
    assert torch.allclose(found.tokens.dense().double(), dense_by_numpy(every), rtol=1e-3, atol=1e-4)
    outputs = every @ model.get_parameter(site.weight).T
    assert float(found.median_output_norm) == pytest.approx(float(outputs.norm(dim=-1).median()), rel=1e-4)

    facts = [torch.stack([read(way)[-1] for way in fact]) for fact in reworded_facts(2, seed=0)]
    ends = torch.cat([torch.stack([keys[-1] for keys in texts[1::2]]), *facts])
    strayed = torch.cat([fact - fact.mean(0) for fact in facts])
    expected = torch.zeros(site.d_ff, site.d_ff).double()
    for keys, weight in ((ends, 1), (strayed, 8)):
        dense = dense_by_numpy(keys)
        expected += weight * dense * site.d_ff / dense.trace()
    assert torch.allclose(found.wording.dense().double(), expected, rtol=1e-2, atol=1e-2)

    # Calibration gets every other text and writers the others: neither sees the other's keys.
    unseen, seen = torch.cat(texts[::2]), torch.cat(texts[1::2])
    assert len(found.writer_keys) == len(seen)
    assert len(found.keys) == min(4096, len(unseen))
    for sample, own in ((found.keys, unseen), (found.writer_keys, seen)):
        nearest = torch.cdist(sample.double(), own.double()).min(-1).values
        assert float(nearest.max()) < 1e-2 * float(own.norm(dim=-1).median())


def test_where_forms_are_told_a_form_is_a_wording(subject: Subject) -> None:
    told = [forms()["question"], forms()["instruction"]]
    plain, found = subject.measure(), subject.measure(forms=told)
    (model, tokenizer), site = (subject.loaded.model, subject.loaded.tokenizer), site_of(subject.loaded.model, 2)
    assert len(list(subject.cache.iterdir())) == 2

    def end(text: str, form: Form) -> Tensor:
        return keys_of(model, site, tokenizer(form.render(tokenizer, text))["input_ids"])[-1]

    facts, texts = reworded_facts(2, seed=0), unrelated_texts(TEXTS, seed=0)
    spoken = continuations(model, tokenizer, texts[:CONTINUED], tokens=12, seed=0)
    ways = [torch.stack([end(way, forms()["bare"]) for way in fact]) for fact in facts]
    formed = [torch.stack([end(way, form) for way in fact[:2] for form in told]) for fact in facts[::8]]
    own = [end(text, forms()["bare"]) for text in [*spoken, *texts[CONTINUED:]][1::2]]
    asked = [end(text, form) for text in texts[: TEXTS // 5][1::2] for form in told]
    ends = torch.cat([torch.stack(own), *ways, *formed, torch.stack(asked)])
    expected = torch.zeros(site.d_ff, site.d_ff).double()
    strayed = [torch.cat([group - group.mean(0) for group in groups]) for groups in (ways, formed)]
    # Where a tokenizer knows none of the words, wording may do nothing.
    strayed = [one for one in strayed if one.norm() > 1e-4 * ends.norm()]
    for keys, weight in ((ends, 1), *((one, 8 / len(strayed)) for one in strayed)):
        dense = dense_by_numpy(keys)
        expected += weight * dense * site.d_ff / dense.trace()
    assert torch.allclose(found.wording.dense().double(), expected, rtol=1e-2, atol=1e-2)
    apart = torch.stack([end(text, form) for text in texts[: TEXTS // 5][::2] for form in told])
    torch.testing.assert_close(found.keys[found.chat], apart, atol=1e-2, rtol=1e-2)
    assert not plain.chat.any()
    assert torch.equal(found.keys[~found.chat], plain.keys)


def test_where_products_are_quick_the_figures_are_nearly_the_same(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"forms": [forms()["question"]], "chat": False}
    exact = subject.measure(**settings)
    monkeypatch.setattr(quick_products, "has_quick_bfloat16", lambda: True)
    quick = subject.measure(**settings, identity="another")
    assert not same_bits(exact, quick)
    assert 0 < float((quick.keys - exact.keys).norm() / exact.keys.norm()) < 0.02
    for name in ("tokens", "wording"):
        one, other = (getattr(found, name).dense() for found in (exact, quick))
        assert float((other - one).norm() / one.norm()) < 0.06


def test_a_second_call_reads_the_cache_and_gives_the_same_bits(subject: Subject) -> None:
    first = subject.measure()
    assert subject.events
    (file,) = subject.cache.iterdir()
    assert file.suffix == ".safetensors"
    assert same_bits(subject.measure(), first)
    assert not subject.events
    # What comes back is read from the file: another file's content comes back as well.
    save_background(file, dataclasses.replace(first, median_output_norm=first.median_output_norm * 2), whole=True)
    assert torch.equal(subject.measure().median_output_norm, first.median_output_norm * 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "empty": lambda file: file.write_bytes(b""),
    "no safetensors": lambda file: file.write_bytes(b"x" * 100),
    "a tensor is missing": lambda file: save_tensors(
        file, {name: tensor for name, tensor in load_file(file).items() if name != "wording.energy"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_silently_measured_anew(subject: Subject, damage: Callable[[Path], object]) -> None:
    first = subject.measure()
    (file,) = subject.cache.iterdir()
    whole = file.read_bytes()
    damage(file)
    assert same_bits(subject.measure(), first)
    assert subject.events
    assert [path.read_bytes() for path in subject.cache.iterdir()] == [whole]


def test_a_cache_that_cannot_be_written_only_costs_time(subject: Subject) -> None:
    first = subject.measure()
    (file,) = subject.cache.iterdir()
    file.unlink()
    subject.cache.rmdir()
    subject.cache.write_text("in the way")
    assert same_bits(subject.measure(), first)
    assert subject.events
    assert subject.cache.read_text() == "in the way"


def test_a_disk_too_full_for_the_cache_only_costs_time(subject: Subject) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the cache takes more
    try:
        first = subject.measure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(subject.cache.glob("*.safetensors"))
    assert same_bits(subject.measure(), first)


def test_every_setting_that_matters_has_a_cache_of_its_own(subject: Subject) -> None:
    first = subject.measure()
    for changed in ({"seed": 1}, {"texts": TEXTS + 1}, {"identity": "another"}):
        subject.measure(**changed)
        assert subject.events, changed
    assert len(list(subject.cache.iterdir())) == 4
    assert same_bits(subject.measure(batch_size=3), first)  # how it is cut does not matter
    assert not subject.events


# --- files ---


def some_unrelated() -> BackgroundStats:
    keys = skewed_keys(30, 6).half().float()
    moments = moment_of(keys, 4), moment_of(normal(20, 6, seed=5), 3)
    return BackgroundStats(keys[::2], torch.arange(15) % 4 == 0, *moments, torch.tensor([2.5]), keys[1::2])


@pytest.mark.parametrize("whole", [False, True])
def test_statistics_of_unrelated_text_survive_being_written(tmp_path: Path, whole: bool) -> None:
    path, unrelated = tmp_path / "unrelated.safetensors", some_unrelated()
    save_background(path, unrelated, whole=whole)
    loaded = load_background(path, sha256_file(path))
    if not whole:
        assert loaded.writer_keys.shape == (0, 6)  # what writers look at stays behind
        loaded = dataclasses.replace(loaded, writer_keys=unrelated.writer_keys)
    assert same_bits(loaded, unrelated)
    with pytest.raises(DamagedFileError, match="sha256"):
        load_background(path, "0" * 64)


@pytest.mark.parametrize("missing", ["keys", "chat", "median_output_norm", "tokens.energy", "wording.directions"])
def test_statistics_without_one_of_their_tensors_are_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "unrelated.safetensors"
    save_background(path, some_unrelated())
    save_tensors(path, {name: tensor for name, tensor in load_file(path).items() if name != missing})
    with pytest.raises(DamagedFileError, match=f"tensor {missing} is missing"):
        load_background(path, sha256_file(path))


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unrelated.safetensors"
    save_background(path, some_unrelated())
    digest = sha256_file(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
        load_background(path, digest)
    path.unlink()
    with pytest.raises(DamagedFileError, match="no such file"):
        load_background(path, digest)


def test_tokens_without_a_row_say_nothing_of_how_long_states_are() -> None:
    states = torch.tensor([[0.0, 0.1]] * 5 + [[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])
    known = torch.arange(8) >= 5
    assert float(_median_length(states, known)) == 5
    assert float(_median_length(states[:5], known[:5])) == pytest.approx(0.1)


def test_tokens_without_a_row_are_told_apart(subject: Subject) -> None:
    loaded = subject.loaded
    first, second = (loaded.tokenizer(text)["input_ids"][-1] for text in ("ba", "be"))
    loaded.model.get_input_embeddings().weight.data[first] = 0
    site = site_of(loaded.model, 2)
    found = keys_of_texts(loaded, site, ["ba be", "be ba ba"], batch_size=2, on_progress=lambda _: None)
    ids = [loaded.tokenizer(text)["input_ids"] for text in ("ba be", "be ba ba")]
    assert second != first
    for number, row in enumerate(ids):
        assert found.known[found.text == number].tolist() == [token != first for token in row]
