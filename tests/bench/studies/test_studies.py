import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import choice_of
from support.loading import CPU
from support.quick_edits import edit_quickly
from support.studying import ALL, make_place, studied

from wisecli.artifacts.memory_manifest import read_memory
from wisecli.bench.compare import BenchReport, bench
from wisecli.bench.reporting import plots
from wisecli.bench.studies import latency
from wisecli.bench.studies.base import STUDIES
from wisecli.bench.studies.layers import chosen
from wisecli.bench.studies.router import area
from wisecli.bench.study import StudyReport
from wisecli.commands.edit.edit import edit
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import BenchSettings, EditSettings, EvalSettings, MergeSettings
from wisecli.errors import ChangedInputError, SettingsError
from wisecli.evaluation.edited_model import attach
from wisecli.memory.merging.merge_methods import METHODS
from wisecli.memory.merging.merger import EXACT
from wisecli.models.loading import load_model

QUALITIES = ("reliability", "generalization", "locality")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def report(place: Path) -> StudyReport:
    with pytest.MonkeyPatch.context() as patch:
        edit_quickly(patch)
        patch.setattr(latency, "_ROUNDS", 1)
        return studied(place, place / "out")


@pytest.fixture(autouse=True)
def quick_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    edit_quickly(monkeypatch)


def test_every_study_has_the_rows_it_promises(report: StudyReport) -> None:
    points = {
        name: [tuple(value for setting, value in row.items() if setting not in ("edits", "figures")) for row in rows]
        for name, rows in report.rows.items()
    }
    assert list(points) == ALL.split(",")
    assert sorted(points) == sorted(STUDIES)
    assert points["router"] == [("gradient", "merge"), ("solve", "merge"), ("solve", "lookup")]
    assert points["layers"] == [(layer,) for layer in chosen(5, 3)]
    assert points["shards"] == list(product((0.3, 0.6), (1, 2)))  # eight shards have not an edit each
    ways = [*METHODS, *(f"{name}+refit" for name in METHODS), EXACT, "retrieve", "lookup"]
    assert sorted(points["merge"]) == sorted((3, way) for way in ways)
    assert points["scaling"] == [(3, mode) for mode in ("lookup", "retrieve", "merge")]
    assert [point[:3] for point in points["latency"]] == [(3, mode, "cpu") for mode in ("lookup", "retrieve", "merge")]
    assert all(row["edits"] == 6 for rows in report.rows.values() for row in rows)


@pytest.mark.parametrize("name", ["layers", "shards", "merge", "scaling"])
def test_qualities_are_shares_and_edits_take(report: StudyReport, name: str) -> None:
    for row in report.rows[name]:
        assert all(0 <= row["figures"][quality] <= 1 for quality in QUALITIES), row
    best = max(row["figures"]["reliability"] for row in report.rows[name])
    assert best > 0.9 > max(row["figures"]["before"]["reliability"] for row in report.rows[name])


def test_a_row_is_what_the_commands_say_one_after_the_other(place: Path, report: StudyReport, tmp_path: Path) -> None:
    lines = (place / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "edits.jsonl").write_text("".join(lines[:6]))
    settings = EditSettings(unrelated_texts=16, residual_stop=0.2, shards=2, mask_ratio=0.6, site="matrix")
    edit(str(place / "model"), tmp_path / "edits.jsonl", tmp_path / "shards", settings, load=CPU)
    merge([tmp_path / "shards"], tmp_path / "memory", MergeSettings(mode="merge", method="ties", refit=False))
    given = EvalSettings(generate=False)
    whole = evaluate(tmp_path / "memory", given, data=tmp_path / "edits.jsonl", load=CPU).after
    row = next(row for row in report.rows["shards"] if (row["mask_ratio"], row["shards"]) == (0.6, 2))
    for quality in QUALITIES:
        assert row["figures"][quality] == pytest.approx(whole[quality])
    assert row["figures"]["mean"] == pytest.approx(sum(whole[quality] for quality in QUALITIES) / 3)


def test_the_layers_are_spread_and_half_of_them_are_where_the_probe_looks() -> None:
    assert chosen(30, 6) == [1, 6, 12, 18, 23, 28]
    assert chosen(30, 1) == [23]
    assert chosen(5, 8) == [1, 2, 3]
    assert chosen(30, 100) == list(range(1, 29))


def test_the_oracle_opens_what_the_router_misses(report: StudyReport) -> None:
    figures = {row["mode"]: row["figures"] for row in report.rows["scaling"]}
    for mode in ("lookup", "retrieve"):
        assert figures[mode]["routing"] < 1
        assert figures[mode]["oracle_generalization"] > figures[mode]["generalization"]
    assert figures["lookup"]["oracle_reliability"] == 1


@pytest.mark.thorough
def test_what_is_there_is_not_measured_again(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out", ignore=shutil.ignore_patterns("memory", "shards-*"))
    stages: list[str] = []
    again = studied(place, tmp_path / "out", on_progress=lambda event: stages.append(event.stage))
    assert stages == []
    assert again.rows == {
        name: json.loads((place / "out" / f"study-{name}.json").read_text())["rows"] for name in ALL.split(",")
    }
    more = studied(
        place,
        tmp_path / "out",
        study="shards",
        shard_counts="1,3",
        on_progress=lambda event: stages.append(event.stage),
    )
    assert [stage for stage in stages if stage.startswith("shards: ")] == [
        f"shards: edits 6, mask_ratio {ratio}, shards 3" for ratio in (0.3, 0.6)
    ]
    assert more.rows["shards"][0] == again.rows["shards"][0]


def test_shards_that_several_rows_need_are_written_once(report: StudyReport) -> None:
    rows = [row for name in ("merge", "scaling", "latency") for row in report.rows[name]]
    assert {row["shards"] for row in rows} == {3}
    # Three layers, four cells of the grid, one for each writer, one for lookups, and one each for all of those rows.
    assert len(list((report.output / "work").glob("shards-6-*"))) == 3 + 4 + 2 + 1 + 2


def test_other_input_is_refused_until_forced(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    first = studied(place, tmp_path / "out", study="router")
    with pytest.raises(ChangedInputError, match="seed was 0, now 1"):
        studied(place, tmp_path / "out", study="layers", seed=1)
    with pytest.raises(ChangedInputError, match="seed was 0, now 1"):
        compare(place, tmp_path / "out", seed=1)
    forced = studied(place, tmp_path / "out", study="router", seed=1, counts="5", force=True)
    assert not (tmp_path / "out" / "study-layers.json").exists()
    assert forced.rows["router"][0]["figures"] != first.rows["router"][0]["figures"]
    assert len((tmp_path / "out" / "study-router.jsonl").read_text().splitlines()) == 3


def compare(place: Path, output: Path, **settings: Any) -> BenchReport:
    given = BenchSettings(methods="ft-l", counts="2", resamples=20, **settings)
    return bench(str(place / "model"), output, given, data=[place / "data.jsonl"], load=CPU)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"study": "router,magic"}, "'magic' is unknown; known are latency, layers, merge, router, scaling, shards"),
        ({"study": "shards", "mask_ratios": "0,.5"}, "mask_ratios must be numbers from 1e-06 to 1"),
        ({"study": "shards", "mask_ratios": "half"}, "mask_ratios must be numbers"),
        ({"study": "shards", "shard_counts": "1.5"}, "shard_counts must be numbers"),
        ({"study": "shards", "shard_counts": "8,9"}, "--set shard_counts=8,9: more than the 6 edits"),
        ({"study": "router", "counts": "13"}, "data has only 12 records"),
    ],
)
def test_what_cannot_be_studied_is_refused_first(
    place: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)):
        studied(place, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


class Tags(HTMLParser):
    """The tags of a page, and everything that it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.fetched.append(value)


def tags_of(page: Path) -> Tags:
    found = Tags()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def test_one_page_holds_every_picture_and_fetches_nothing(
    place: Path, report: StudyReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = report.output / "report.html"
    found = tags_of(page)
    assert found.fetched == []
    assert "script" not in found.tags
    assert found.tags.count("svg") == found.tags.count("table") == 6
    for name, rows in report.rows.items():
        table = (report.output / f"study-{name}.md").read_text().splitlines()
        assert len(table) == 2 + len(rows)
        assert len({line.count("|") for line in table}) == 1
    # Methods that are compared in the same place stand on the same page, whichever came first.
    compare(place, report.output)
    found = tags_of(page)
    assert (found.tags.count("svg"), found.tags.count("table")) == (3 + 6, 1 + 6)
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    studied(place, report.output, study="router")
    found = tags_of(page)
    assert (found.tags.count("svg"), found.tags.count("table")) == (0, 1 + 6)


@pytest.mark.thorough
def test_the_command_prints_one_object(
    place: Path, run: Callable[..., int], report: StudyReport, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"bench {place / 'model'} --data {place / 'data.jsonl'} -o {report.output} --device cpu --edits 6"
    assert run(*line.split(), "--study", "scaling,router", "--json", "-q") == 0
    content = json.loads(capsys.readouterr().out)
    assert content.keys() == {"studies", "config", "versions"}
    assert content["studies"] == {name: report.rows[name] for name in ("scaling", "router")}
    assert run(*line.split(), "--study", "layers", "--set", "layers=3") == 0
    assert "Which layer" in capsys.readouterr().out
    assert run("bench", "--help") == 0
    named = capsys.readouterr().out
    assert all(f"{name}," in named or f"{name}." in named for name in ALL.split(","))
    assert run(*line.split(), "--study", "layers", "--methods", "rome") == 2
    assert "--study takes the place of --methods" in capsys.readouterr().err


def test_the_area_counts_pairs_in_the_right_order() -> None:
    assert area([3.0, 1.0], [2.0, 0.0, 1.0]) == pytest.approx((1 + 1 + 1 + 0 + 1 + 0.5) / 6)


def test_the_routers_shares_are_the_memorys_own_decisions(place: Path, report: StudyReport, tmp_path: Path) -> None:
    prompts = grouped(place, tmp_path / "edits.jsonl")
    loaded = load_model(place / "model", load=CPU)
    shares = set()
    for row in report.rows["router"][:1]:  # facts decide about the others
        settings = EditSettings(unrelated_texts=16, residual_stop=0.2, writer=row["writer"])
        shards = tmp_path / f"{row['writer']}-{row['mode']}"
        edit(str(place / "model"), tmp_path / "edits.jsonl", shards, settings, load=CPU)
        merge([shards], tmp_path / "memory", MergeSettings(mode=row["mode"]), force=True)
        manifest = read_memory(tmp_path / "memory")
        wide = {
            name: value.float() if value.is_floating_point() else value
            for name, value in manifest.memory.tensors.items()
        }
        memory = replace(manifest.memory, tensors=wide)
        for group, texts in prompts.items():
            ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
            opened = [choice_of(loaded.model, manifest.site, memory, tokens) is not None for tokens in ids]
            shares.add(sum(opened) / len(opened))
            assert row["figures"][f"{group}_above"] == pytest.approx(sum(opened) / len(opened)), group
            assert len(row["figures"]["scores"][group]) == len(texts)
        assert len(row["figures"]["scores"]["unrelated"]) == 200
    assert len(shares) > 1


def test_a_prompt_that_means_an_edit_is_answered_otherwise(place: Path, report: StudyReport, tmp_path: Path) -> None:
    row = report.rows["router"][-1]
    prompts = grouped(place, tmp_path / "edits.jsonl")
    shards = tmp_path / "shards"
    settings = EditSettings(unrelated_texts=16, residual_stop=0.2)
    edit(str(place / "model"), tmp_path / "edits.jsonl", shards, settings, load=CPU)
    merge([shards], tmp_path / "memory", MergeSettings())
    edited, base = attach(tmp_path / "memory", load=CPU), load_model(place / "model", load=CPU)
    shares = []
    for group, texts in prompts.items():
        ids = [torch.tensor([base.tokenizer(text)["input_ids"]]) for text in texts]
        with torch.no_grad():
            opened = [not torch.equal(edited.model(one).logits, base.model(one).logits) for one in ids]
        shares.append(sum(opened) / len(opened))
        assert row["figures"][f"{group}_above"] == pytest.approx(shares[-1]), group
    assert row["figures"]["threshold"] == 1
    assert shares[0] == 1 > min(shares)


def grouped(place: Path, file: Path) -> dict[str, list[str]]:
    """The prompts of the first six records, which are written to a file."""
    lines = (place / "data.jsonl").read_text().splitlines(keepends=True)[:6]
    file.write_text("".join(lines))
    records = [json.loads(line) for line in lines]
    return {
        "edits": [one["prompt"] for one in records],
        "rephrases": [text for one in records for text in one["rephrases"]],
        "locality": [probe["prompt"] for one in records for probe in one["locality"]],
    }
