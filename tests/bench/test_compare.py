import html.parser
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.benching import make_quick, record
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.bench.compare import BenchReport, bench
from wisecli.bench.methods.base import METHODS
from wisecli.bench.reporting import html_tables
from wisecli.bench.reporting.html_tables import columns, costs, markdown, note, page
from wisecli.bench.reporting.plots import pictures
from wisecli.bench.result_row import Peaks, RowMaker, interval
from wisecli.cli.commands.bench import tell_bench
from wisecli.cli.console import Console
from wisecli.config import BenchSettings
from wisecli.errors import ChangedInputError, DamagedFileError, SettingsError
from wisecli.evaluation.answers import Answer, Answers, Batch, KnownAnswers, Targets

FIGURES = {
    "as_taught",
    "as_taught_unseen",
    "rephrased",
    "unrelated_unchanged",
    "other_question",
    "reliability",
    "generalization",
    "locality",
    "perplexity",
    "generated_exact",
    "seconds_per_edit",
    "bytes",
    "overhead",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    save_tiny(root / "model")
    (root / "data.jsonl").write_text("".join(json.dumps(record(number)) + "\n" for number in range(30)))
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def compare(place: Path, output: Path, **settings: Any) -> BenchReport:
    named = {name: settings.pop(name) for name in ("force", "on_progress", "train") if name in settings}
    data = settings.pop("data", [place / "data.jsonl"])
    few = {"forms": "bare,polite", "kinds": "count,two hops", "ask": 3}
    given = BenchSettings(**{"methods": "wise,ft-l", "counts": "2,4", "resamples": 50, **few, **settings})
    return bench(str(place / "model"), output, given, data=data, load=CPU, **named)


def test_a_row_for_every_method_and_number_of_edits(place: Path, tmp_path: Path) -> None:
    report = compare(place, tmp_path / "out", kinds="all")
    assert [(row["edits"], row["method"]) for row in report.rows] == [
        (2, "wise"),
        (2, "ft-l"),
        (4, "wise"),
        (4, "ft-l"),
    ]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["results"].keys() == {"wise", "ft-l"}
    for name, by_count in content["results"].items():
        for count, figures in by_count.items():
            assert figures.keys() >= FIGURES, name
            assert len(figures["by_age"]) == int(count)
            low, high = figures["intervals"]["reliability"]
            assert low <= figures["reliability"] <= high
            assert figures["reliability"] == pytest.approx(sum(figures["by_age"]) / int(count))
    # Before editing, the model is the same whoever edits it, and whatever reads it.
    befores = [by_count["4"]["before"] for by_count in content["results"].values()]
    for figure in ("reliability", "generalization", "generated_exact"):
        assert befores[0][figure] == befores[1][figure]
    assert befores[0]["perplexity"] == pytest.approx(befores[1]["perplexity"], rel=1e-4)


def test_datasets_take_turns_in_one_memory_and_have_figures_of_their_own(place: Path, tmp_path: Path) -> None:
    for name, first in (("left", 0), ("right", 10)):
        records = (record(number) for number in range(first, first + 9))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    files = [tmp_path / f"{name}.jsonl" for name in ("left", "right")]
    report = compare(place, tmp_path / "out", counts="5", data=files)
    assert report.dataset == "left,right"
    edits = [json.loads(line)["id"] for line in (tmp_path / "out" / "work" / "edits.jsonl").read_text().splitlines()]
    assert edits == ["left/0", "right/10", "left/1", "right/11", "left/2"]
    for row in report.rows:
        domains = row["figures"]["domains"]
        assert domains.keys() == {"left", "right"}
        for figure in ("reliability", "generalization", "generated_exact"):
            whole = (3 * domains["left"][figure] + 2 * domains["right"][figure]) / 5
            assert whole == pytest.approx(row["figures"][figure]), figure
    assert "routing" in report.rows[0]["figures"]["domains"]["left"]
    with pytest.raises(SettingsError, match="--data is given 2 times for 3 datasets"):
        compare(place, tmp_path / "other", data=files, dataset="zsre,temporal,hallucination")


def test_rows_that_are_there_are_not_measured_again(place: Path, tmp_path: Path) -> None:
    first = compare(place, tmp_path / "out", counts="2")
    stages: list[str] = []
    second = compare(place, tmp_path / "out", on_progress=lambda event: stages.append(event.stage))
    assert second.rows[:2] == first.rows
    assert "wise, 4 edits" in stages
    assert "wise, 2 edits" not in stages
    for changed in ({"seed": 1}, {"generate": False}, {"ask": 2}, {"protocol": "wild"}):
        with pytest.raises(ChangedInputError, match=rf"{next(iter(changed))} was"):
            compare(place, tmp_path / "out", **changed)
    with pytest.raises(ChangedInputError, match="train was the rest, now "):
        compare(place, tmp_path / "out", train=place / "data.jsonl")
    forced = compare(place, tmp_path / "out", counts="2", methods="ft-l", generate=False, force=True)
    assert len(forced.rows) == 1
    assert "generated_exact" not in forced.rows[0]["figures"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": "wise,magic"}, "'magic' is unknown; known are wise, "),
        ({"forms": "bare,loud"}, "--forms: 'loud' is unknown; known are all, "),
        ({"counts": "2,many"}, "--edits must be numbers"),
        ({"counts": "0"}, "--edits must be numbers"),
        ({"counts": "31"}, "data has only 30 records"),
    ],
)
def test_what_cannot_be_compared_is_refused(place: Path, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        compare(place, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_generated_answers_stand_first_and_by_wild_if_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(record(number)) + "\n" for number in range(20, 30)))
    forms = compare(place, tmp_path / "forms", counts="3", methods="ft-l,icl,rag", train=train)
    head = markdown(forms.rows).splitlines()[0].split(" | ")
    assert head[2:5] == ["as taught", "as taught, trained", "as taught *"]
    assert head.index("other subject") < head.index("reliability")
    for row in forms.rows:
        low, high = row["figures"]["intervals"]["as_taught"]
        assert low <= row["figures"]["as_taught"] <= high
    bare = compare(place, tmp_path / "bare", counts="3", methods="ft-l", protocol="teacher")
    assert markdown(bare.rows).splitlines()[0].split(" | ")[2] == "reliability"
    assert "generated_exact" in bare.rows[0]["figures"]


def test_wild_has_intervals_and_locality_and_both_protocols_go_together(place: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"counts": "3", "methods": "wise,ft-l"}
    rows = {
        name: compare(place, tmp_path / name, protocol=name, **few).rows for name in ("forms", "wild", "forms,wild")
    }
    heads = ["WILD", "WILD rephrased", "WILD locality"]
    for name in ("wild", "forms,wild"):
        assert markdown(rows[name]).splitlines()[0].split(" | ")[2:5] == heads
        for row in rows[name]:
            figures = row["figures"]
            assert "generated_exact" not in figures
            assert figures.keys() >= {"wild_as_taught", "wild_rephrased", "wild_locality"}
            for figure in figures["intervals"]:
                low, high = figures["intervals"][figure]
                assert low <= figures[figure] <= high, figure
            assert figures["first_100"] == figures["wild_as_taught"] == sum(figures["by_age"]) / 3
            assert figures["intervals"].keys() >= {"first_100", "wild_rephrased", "wild_locality"}
    for both, forms, wild in zip(rows["forms,wild"], rows["forms"], rows["wild"], strict=True):
        for figure in ("as_taught", "rephrased_unseen", "unrelated_unchanged", "other_subject"):
            assert both["figures"][figure] == forms["figures"][figure]
        for figure in ("wild_as_taught", "wild_locality"):
            assert both["figures"][figure] == wild["figures"][figure]


def test_the_unedited_model_answers_once_for_all_methods_and_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    whole = Answers._all

    def told(
        self: Answers, texts: Sequence[str], answer: Batch, known: KnownAnswers, stage: str, targets: Targets
    ) -> list[Answer]:
        asked.extend((stage, text) for text in dict.fromkeys(texts) if text not in known)
        return whole(self, texts, answer, known, stage, targets)

    monkeypatch.setattr(Answers, "_all", told)
    for methods in ("wise,ft-l", "wise,ft-l,rome"):
        compare(place, tmp_path / "out", counts="3", methods=methods, protocol="wild")
    before = [text for stage, text in asked if stage == "unedited answers"]
    assert len(before) == len(set(before)) == 3 * 3
    assert len([text for stage, text in asked if stage == "answers"]) == 3 * len(before)


def test_what_is_put_before_a_prompt_is_counted(place: Path, tmp_path: Path) -> None:
    report = compare(place, tmp_path / "out", counts="2", methods="wise,ft-l,rag", protocol="teacher", generate=False)
    extra = {row["method"]: row["figures"]["extra_tokens"] for row in report.rows}
    assert extra["wise"] == extra["ft-l"] == 0
    # "New Fact:", the prompt with its answer, "Prompt:": a word a token here.
    assert extra["rag"] == 2 + 4 + 1
    cells = [line.split(" | ") for line in markdown(report.rows).splitlines()]
    assert [line[cells[0].index("tokens")] for line in cells[2:5]] == ["0", "0", "7"]


@pytest.mark.parametrize(("width", "tables"), [("80", 2), ("200", 1)])
def test_methods_that_a_terminal_has_no_room_for_stand_in_a_table_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str, tables: int
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    figures = {"reliability": 0.5, "seconds_per_edit": 1.0, "overhead": 0.0, "bytes": 1, "peak_rss_bytes": 1}
    rows = tuple({"method": f"method-{number}", "edits": 10, "figures": figures} for number in range(5))
    tell_bench(Console(), BenchReport("zsre", rows, {}, Path("bench")))
    said = capsys.readouterr().out
    assert said.count("zsre, 10 edits") == said.count("│ reliability │") == tables
    assert [said.count(f" method-{number} ") for number in range(5)] == [1] * 5
    assert said.count("0.500") == 5


def test_columns_that_repeat_others_in_every_row_are_left_out_and_not_explained() -> None:
    def rows(*figures: dict[str, float]) -> list[dict[str, Any]]:
        return [{"figures": own} for own in figures]

    assert [*columns(rows({"wild_as_taught": 0.5, "first_100": 0.5}))] == ["wild_as_taught"]
    both = rows({"wild_as_taught": 0.5, "first_100": 0.5}, {"wild_as_taught": 0.5, "first_100": 0.3})
    assert [*columns(both)] == ["wild_as_taught", "first_100"]
    assert "first 100" in note(both)
    assert "first 100" not in note(both[:1])


@pytest.mark.parametrize(("overhead", "says"), [(-0.004, "+0%"), (-0.006, "-1%"), (1.104, "+110%")])
def test_an_overhead_of_nought_has_no_minus(overhead: float, says: str) -> None:
    figures = {"seconds_per_edit": 1.0, "overhead": overhead, "bytes": 0, "peak_rss_bytes": 0}
    assert costs(figures)[1] == says


def test_the_oldest_hundred_have_a_figure_of_their_own() -> None:
    values = [(place, float(place < 30)) for place in range(250)]
    maker = RowMaker(["one"] * 250, 20, 0)
    each = {"wild_as_taught": values, "reliability": [(0, 1.0)]}
    row = maker.row("some", 250, after={}, before={}, each=each, costs={}, peaks=Peaks(3))
    assert row["figures"]["first_100"] == 0.3
    assert row["figures"]["by_age"] == [value for _, value in values]
    bare = maker.row("some", 250, after={}, before={}, each={"reliability": values}, costs={}, peaks=Peaks(3))
    assert "first_100" not in bare["figures"]
    assert bare["figures"]["by_age"] == [value for _, value in values]


def test_a_method_that_cannot_run_says_so_in_its_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wisecli.bench.methods import load_methods
    from wisecli.bench.methods.base import Bench, Method, UnsuitableError

    def maker(_bench: Bench) -> Method:
        raise UnsuitableError("this model has no such thing; take another")

    load_methods()
    monkeypatch.setitem(METHODS.items_by_name, "ft-l", maker)
    report = compare(place, tmp_path / "out", methods="ft-l", counts="2")
    assert report.rows[0]["figures"] == {"cannot": "this model has no such thing; take another"}
    assert "cannot run: this model has no such thing" in (tmp_path / "out" / "results.md").read_text()
    assert "cannot run: this model has no such thing" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.undo()
    assert "reliability" in compare(place, tmp_path / "out", methods="ft-l", counts="2").rows[0]["figures"]


def test_consequences_are_nobodys_edits(place: Path, tmp_path: Path) -> None:
    records = [{**record(number), "also": [{"prompt": f"ko {number}", "target": "be"}]} for number in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    report = compare(place, tmp_path / "out", data=[tmp_path / "data.jsonl"], counts="3", protocol="teacher")
    assert [len(row["figures"]["by_age"]) for row in report.rows] == [3, 3]
    asked = [json.loads(line)["id"] for line in (tmp_path / "out" / "work" / "edits.jsonl").read_text().splitlines()]
    assert asked == ["0", "1", "2"]


def test_a_row_that_was_broken_off_is_measured_again(place: Path, tmp_path: Path) -> None:
    first = compare(place, tmp_path / "out", methods="ft-l", protocol="teacher")
    rows = tmp_path / "out" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-20])
    again = compare(place, tmp_path / "out", methods="ft-l", protocol="teacher")
    assert len(rows.read_bytes().splitlines()) == 2
    for one, other in zip(first.rows, again.rows, strict=True):
        assert one["figures"]["reliability"] == other["figures"]["reliability"]
    rows.write_bytes(b"{\n" + rows.read_bytes())
    with pytest.raises(DamagedFileError, match=r"rows\.jsonl: line 1 is no JSON; delete that line"):
        compare(place, tmp_path / "out", methods="ft-l", protocol="teacher")


def test_what_is_to_be_erased_is_refused_by_methods_that_cannot(place: Path, tmp_path: Path) -> None:
    records = [{**record(0), "op": "erase", "replacement": "be"}, {**record(1), "op": "erase"}]
    for name, some in (("told", records[:1]), ("erased", records[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    reports = {}
    for name in ("told", "erased"):
        named: dict[str, Any] = {"data": [tmp_path / f"{name}.jsonl"], "counts": "1", "methods": "wise,grace"}
        reports[name] = [row["figures"] for row in compare(place, tmp_path / name, **named).rows]
    assert all(figures["reliability"] == 1 for figures in reports["told"])
    assert reports["erased"][0]["reliability"] == 1
    assert reports["erased"][1] == {"cannot": "it has no way to erase an answer; give every such edit a `replacement`"}


def test_an_interval_is_the_bootstraps() -> None:
    values = [0.0, 1.0] * 50
    low, high = interval(values, resamples=4000, seed=0)
    spread = 1.96 * math.sqrt(0.25 / len(values))
    assert low == pytest.approx(0.5 - spread, abs=0.02)
    assert high == pytest.approx(0.5 + spread, abs=0.02)
    assert interval([1.0] * 9, resamples=100, seed=0) == (1.0, 1.0)


class Links(html.parser.HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.found.append(value)


def test_the_page_needs_nothing_from_elsewhere_and_the_table_holds_every_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_tables, "pictures", pictures)
    report = compare(place, tmp_path / "out", methods="ft-l", counts="2,3")
    text = page(report.rows, title="<b>title</b>", about="<script>x</script>")
    links = Links()
    links.feed(text)
    assert links.found == []
    assert links.tags.count("svg") == 3
    assert "script" not in links.tags
    assert links.tags.count("tr") == 1 + len(report.rows)
    table, below = markdown(report.rows).split("\n\n")[0].splitlines(), markdown(report.rows).split("\n\n")[1]
    assert "* over those in which WISE learns nothing" in below
    assert "* over those in which WISE learns nothing" in text
    assert len(table) == 2 + len(report.rows)
    assert len({line.count("|") for line in table}) == 1
    assert text == page(report.rows, title="<b>title</b>", about="<script>x</script>")
