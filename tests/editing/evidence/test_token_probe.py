from pathlib import Path

import pytest
import torch
from support.helpers import keys_of
from support.spaces import Bench

from wisecli.editing.evidence.token_probe import TokenProbe, _questions


def test_a_token_is_read_behind_questions_once_a_model_and_form(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wisecli.editing.evidence.token_probe.cache_path", lambda kind: tmp_path / kind)
    first = TokenProbe(bench.loaded, bench.site, 8, "a model")
    keys, lengths = first.keys_after_questions(bench.space)
    (kept,) = (tmp_path / "behind").iterdir()
    read: list[object] = []
    monkeypatch.setattr(TokenProbe, "_read", lambda *arguments: read.append(arguments) or (keys + 1, lengths + 1))
    again = TokenProbe(bench.loaded, bench.site, 8, "a model").keys_after_questions(bench.space)
    assert not read
    assert torch.equal(again[0], keys) and torch.equal(again[1], lengths)
    for other, form in (("another model", "{}"), ("a model", "Q: {}\nA:")):
        found = TokenProbe(bench.loaded, bench.site, 8, other).keys_after_questions(bench.space, form)
        assert torch.equal(found[0], keys + 1)
    assert len(read) == 2 and len(list(kept.parent.iterdir())) == 3
    kept.write_bytes(kept.read_bytes()[:-10])
    TokenProbe(bench.loaded, bench.site, 8, "a model").keys_after_questions(bench.space)
    assert len(read) == 3, "what is damaged is read anew"


def test_without_a_models_identity_nothing_is_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wisecli.editing.evidence.token_probe.cache_path", lambda kind: tmp_path / kind)
    behind = TokenProbe(bench.loaded, bench.site, 8)
    keys, _ = behind.keys_after_questions(bench.space)
    assert keys.shape == (32, bench.site.d_ff)
    assert behind.keys_after_questions(bench.space)[0] is keys, "and read once none the less"
    assert not list(tmp_path.iterdir())


def test_what_questions_begin_with_in_a_form_is_read_once(bench: Bench) -> None:
    form = "ba be bi ka " * 4 + "{} ba"
    keys, lengths = TokenProbe(bench.loaded, bench.site, 8).keys_after_questions(bench.space, form)
    texts = [form.replace("{}", text) for text in _questions()]
    rows = [(*bench.loaded.tokenizer(text)["input_ids"], bench.space) for text in texts]
    exact = torch.stack([keys_of(bench.loaded.model, bench.site, row)[-1] for row in rows])
    nearest = torch.cdist(keys, exact).min(1)
    assert float(nearest.values.max()) < 1e-3 * float(exact.norm(dim=-1).median())
    assert len(lengths) == len(keys) == len(exact)
