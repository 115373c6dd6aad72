"""What holds for several methods alike: the same edits twice, and what each names that it lacks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rivals import EDITS, tiny_bench

from wisecli.bench.methods import load_methods
from wisecli.bench.methods.base import METHODS, UnsuitableError
from wisecli.edits.record import Edit

load_methods()


# With the layer of five that lies as deep as the authors'; one always stays above.
@pytest.mark.parametrize(
    ("name", "layer"),
    [("ft-l", 3), ("ft-ewc", 3), ("rome", 2), ("crispedit", 3), ("defer", 3), ("memoir", 3), ("grace", 3)],
)
def test_the_same_edits_twice_leave_the_same_at_the_authors_depth(tmp_path: Path, name: str, layer: int) -> None:
    bench = tiny_bench(tmp_path)
    first, second = (METHODS[name](bench) for _ in range(2))
    one, other = EDITS[:1], EDITS[1:2]
    first.edit([*one, *other])
    for part in [[*one, *other]] if name in ("crispedit", "grace") else [one, other]:  # those learn edits together
        second.edit(part)
    some: Any = first
    assert (some.site if hasattr(some, "site") else some.sites[0]).layer == layer
    states: list[dict[str, torch.Tensor]] = [one.state() for one in (some, second)]  # type: ignore[attr-defined]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["icl", "rag", "rag-hybrid", "rag-shots", "serac"])
def test_without_records_to_learn_from_it_cannot_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsuitableError, match=f"{name} needs records of the train split"):
        METHODS[name](tiny_bench(tmp_path, train=[]))


@pytest.mark.parametrize("name", ["alphaedit", "crispedit", "ft-ewc", "memit", "memoir", "rag-hybrid", "rome"])
def test_without_unrelated_texts_it_cannot_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsuitableError, match="it needs unrelated texts"):
        METHODS[name](replace(tiny_bench(tmp_path, train=[]), texts=()))


@pytest.mark.parametrize("name", ["crispedit", "ft-ewc"])
def test_texts_of_a_single_token_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsuitableError, match="it needs unrelated texts"):
        METHODS[name](replace(tiny_bench(tmp_path), texts=["ba"]))


@pytest.mark.parametrize("name", ["crispedit", "defer", "ft-l", "lora", "memoir", "rome", "ultraedit"])
def test_what_cannot_be_learnt_is_named(tmp_path: Path, name: str) -> None:
    bench = tiny_bench(tmp_path)
    method = METHODS[name](bench)
    with pytest.raises(UnsuitableError, match="'odd'"):
        method.edit([Edit("odd", "ba", "...")])
    bench.loaded.model.get_output_embeddings().weight.data[:] = torch.nan
    with pytest.raises(UnsuitableError, match="not finite"):
        method.edit(EDITS[:1])
