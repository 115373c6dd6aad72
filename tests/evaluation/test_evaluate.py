import contextlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.evaluation import answer_of, edited_model, logits_by_loop, text_of, unedited_logits
from support.helpers import choice_of, perplexity_of, random_rows, right_share
from support.loading import CPU
from support.tiny_models import Chain
from torch import Tensor

from wisecli.commands.measure.evaluate import EvalReport, evaluate
from wisecli.config import EvalSettings
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import Edit
from wisecli.errors import GateFailedError, SettingsError, WiseError
from wisecli.evaluation.edited_model import EditedModel
from wisecli.evaluation.teacher_forcing import Measured, teacher_forced
from wisecli.models.prompts.tokenization import Row, encode
from wisecli.progress import ignore_progress

LENGTHS = ((1, 2), (4, 1), (11, 3), (7, 6), (2, 5), (6, 4), (9, 2), (3, 3), (5, 5), (8, 1), (10, 4), (12, 2))
ROWS = random_rows(*LENGTHS, seed=21)
KINDS = [
    ("matrix", "last", 1),
    ("matrix", "last", 2),
    ("matrix", "mean", 2),
    ("lookup", "last", 1),
    ("lookup", "last", 2),
    ("facts", "last", 2),
]


def prompt_choice(edited: EditedModel, row: Row) -> int | None:
    """The memory that a prompt opens."""
    with edited.unedited():
        return choice_of(edited.model, edited.manifest.site, edited.manifest.memory, row.prompt)


def measure(edited: EditedModel, rows: Sequence[Row], *, size: int = 32) -> list[Measured]:
    return teacher_forced(edited, rows, batch_size=size, stage="test", on_progress=ignore_progress)


def known_share(logits: Tensor, target: Sequence[int]) -> float:
    return statistics.fmean(float(row.softmax(-1)[token]) > 0.8 for row, token in zip(logits, target, strict=True))


@pytest.mark.parametrize(("kind", "pooling", "memories"), KINDS)
def test_figures_are_those_of_the_whole_model_run_row_by_row(
    tmp_path: Path, kind: str, pooling: str, memories: int
) -> None:
    edited = edited_model(tmp_path, kind=kind, pooling=pooling, memories=memories)
    rows = [likely(edited, row) for row in ROWS]
    measured = measure(edited, rows)
    assert len(measured) == len(rows)
    for row, one in zip(rows, measured, strict=True):
        before, after = unedited_logits(edited, row), logits_by_loop(edited, row)
        for reading, logits in ((one.before, before), (one.after, after)):
            assert reading.right == pytest.approx(right_share(logits, row.target))
            assert reading.known == pytest.approx(known_share(logits, row.target))
            assert reading.perplexity == pytest.approx(perplexity_of(logits, row.target), rel=1e-3)
        same = [int(one.argmax()) == int(other.argmax()) for one, other in zip(before, after, strict=True)]
        assert one.same == pytest.approx(statistics.fmean(same))
        assert one.opened == (-1 if (choice := prompt_choice(edited, row)) is None else choice)
    assert {0.0, 1.0} < {one.after.right for one in measured} | {one.before.right for one in measured}
    assert any(one.same < 1 for one in measured)
    # With one memory some rows stay untouched among those that do not.
    assert memories > 1 or any(one.before == one.after for one in measured)


def test_figures_of_every_architecture_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    edited = edited_model(tmp_path, kind="lookup", architecture=architecture)
    measured = measure(edited, ROWS)
    for row, one in zip(ROWS, measured, strict=True):
        for reading, logits in ((one.before, unedited_logits(edited, row)), (one.after, logits_by_loop(edited, row))):
            assert reading.right == pytest.approx(right_share(logits, row.target))
            assert reading.perplexity == pytest.approx(perplexity_of(logits, row.target), rel=1e-3)
    assert any(one.before != one.after for one in measured)


def likely(edited: EditedModel, row: Row) -> Row:
    """The row with every second target token replaced by the edited model's own choice, so that some are right."""
    logits = logits_by_loop(edited, row)
    tokens = [
        int(one.argmax()) if place % 2 == 0 else token
        for place, (one, token) in enumerate(zip(logits, row.target, strict=True))
    ]
    return Row(row.prompt, tuple(tokens))


def test_a_token_is_known_from_a_probability_of_four_fifths(tmp_path: Path) -> None:
    edited = edited_model(tmp_path)
    edited.model.get_output_embeddings().weight *= 2  # a model that is surer of itself
    rows = [likely(edited, row) for row in random_rows(*[(4, 1)] * 80, seed=41)]
    logits = [logits_by_loop(edited, row)[0] for row in rows]
    surest = [float(one.softmax(-1).max()) for one in logits]
    assert any(0.6 < one < 0.8 for one in surest)
    assert any(0.8 < one < 0.95 for one in surest)
    measured = measure(edited, rows)
    assert [one.after.known for one in measured] == [float(one > 0.8) for one in surest]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", ["matrix", "lookup"])
def test_the_batch_size_changes_no_figure(tmp_path: Path, kind: str, size: int) -> None:
    edited = edited_model(tmp_path, kind=kind)
    together = measure(edited, ROWS, size=32)
    apart = measure(edited, ROWS, size=size)
    require_equal(apart, together)


def require_equal(some: Sequence[Measured], others: Sequence[Measured]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one.same, one.before.right, one.after.right) == (other.same, other.before.right, other.after.right)
        assert (one.before.known, one.after.known) == (other.before.known, other.after.known)
        assert one.before.loss == pytest.approx(other.before.loss, abs=1e-4)
        assert one.after.loss == pytest.approx(other.after.loss, abs=1e-4)


def test_a_model_whose_memory_never_opens_is_the_unedited_model(tmp_path: Path) -> None:
    edited = edited_model(tmp_path)
    edited.routed.thresholds = (1e9,)
    for one in measure(edited, ROWS):
        assert one.before == one.after
        assert one.same == 1


def test_the_batch_size_changes_no_figure_of_the_real_chain(
    chain: Chain, edited_chain: EditedModel, sweep: Any
) -> None:
    rows = [encode(edited_chain.tokenizer, edit["prompt"], edit["target"]) for edit in chain.edits[::2]]
    rows += [
        encode(edited_chain.tokenizer, p.prompt, p.answer) for e in edited_chain.manifest.edits[::2] for p in e.locality
    ]
    together = measure(edited_chain, rows, size=32)
    for size in sweep((1,), (1, 3)):
        require_equal(measure(edited_chain, rows, size=size), together)
    assert all(one.after.right == 1 for one in together[: len(chain.edits[::2])])


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[EditedModel, list[Edit], EvalReport]:
    """A report on a tiny model whose edits hold in part: targets are made of the model's own answers."""
    root = tmp_path_factory.mktemp("report")
    edited = edited_model(root, edits=[Edit("only", "ba", "be")])
    records = [record_for(edited, number) for number in range(6)]
    path = root / "records.jsonl"
    path.write_text("\n".join(json.dumps(record.as_dict()) for record in records))
    settings = EvalSettings(dataset=str(path), batch_size=4, max_new_tokens=6)
    return edited, records, evaluate(root / "memory", settings, load=CPU)


def record_for(edited: EditedModel, number: int) -> Edit:
    prompts = [text_of(edited, row.prompt) for row in random_rows(*[(3 + number, 1)] * 5, seed=400 + number)]
    answer = answer_of(edited, prompts[0], 3)
    # The record's target: the model's answer, its beginning, or something else.
    target = (answer, " ".join(answer.split()[:2]), f"{answer.split()[0]} ba ba")[number % 3]
    rephrases = tuple(prompts[1 : 1 + number % 3])
    locality = tuple(EvaluationPrompt(prompt, "da de di do") for prompt in prompts[3 : 4 + number % 2])
    portability = (EvaluationPrompt(prompts[4], answer_of(edited, prompts[4], 2)),) if number % 2 else ()
    ood = (f"{prompts[0]} {answer_of(edited, prompts[0], 4)}", "ka ke ki ko") if number < 2 else ()
    return Edit(
        f"record-{number}", prompts[0], target, rephrases=rephrases, locality=locality, portability=portability, ood=ood
    )


def row_of(edited: EditedModel, prompt: str, target: str) -> Row:
    return Row(tuple(edited.tokenizer(prompt)["input_ids"]), tuple(edited.tokenizer(target)["input_ids"]))


def both(edited: EditedModel, row: Row) -> tuple[Tensor, Tensor]:
    return unedited_logits(edited, row), logits_by_loop(edited, row)


Reported = tuple[EditedModel, list[Edit], EvalReport]


@pytest.mark.parametrize("name", ["reliability", "generalization", "portability"])
def test_shares_of_right_tokens_are_means_over_edits(reported: Reported, name: str) -> None:
    edited, records, report = reported
    groups = {
        "reliability": [[(record.prompt, record.target)] for record in records],
        "generalization": [[(text, record.target) for text in record.rephrases] for record in records],
        "portability": [[(probe.prompt, probe.answer) for probe in record.portability] for record in records],
    }[name]
    shares = []
    for group in filter(None, groups):
        rows = [row_of(edited, *pair) for pair in group]
        pairs = [[right_share(logits, row.target) for logits in both(edited, row)] for row in rows]
        shares.append([statistics.fmean(column) for column in zip(*pairs, strict=True)])
    before, after = (statistics.fmean(column) for column in zip(*shares, strict=True))
    assert report.before[name] == pytest.approx(before)
    assert report.after[name] == pytest.approx(after)
    assert report.samples[name] == sum(map(len, groups))
    if name == "reliability":
        assert before != pytest.approx(after)
        assert 0 < after < 1


def test_locality_is_the_share_of_unchanged_choices(reported: Reported) -> None:
    edited, records, report = reported
    means = []
    for record in records:
        shares = []
        for probe in record.locality:
            before, after = both(edited, row_of(edited, probe.prompt, probe.answer))
            shares.append(float((before.argmax(-1) == after.argmax(-1)).float().mean()))
        means.append(statistics.fmean(shares))
    assert report.before["locality"] == 1
    assert report.after["locality"] == pytest.approx(statistics.fmean(means))
    assert report.after["locality"] < 1


def test_perplexities_are_of_the_targets(reported: Reported) -> None:
    edited, records, report = reported
    rows = [row_of(edited, record.prompt, record.target) for record in records]
    for place, figures in enumerate((report.before, report.after)):
        values = sorted(perplexity_of(both(edited, row)[place], row.target) for row in rows)
        assert figures["perplexity"] == pytest.approx(sum(values) / 6, rel=1e-3)
        assert figures["perplexity_median"] == pytest.approx((values[2] + values[3]) / 2, rel=1e-3)
        assert figures["perplexity_clipped"] == pytest.approx(sum(min(v, 100) for v in values) / 6, rel=1e-3)
    assert report.before["perplexity_clipped"] < report.before["perplexity"]


def test_ood_generalization_is_the_share_of_tokens_the_model_is_sure_of(reported: Reported) -> None:
    edited, records, report = reported
    for place, figures in enumerate((report.before, report.after)):
        means = []
        for record in records[:2]:
            answer = record.ood[0].removeprefix(record.prompt)
            rows = [row_of(edited, record.prompt, answer), row_of(edited, "ka", "ke ki ko")]
            pairs = [(both(edited, row)[place], row.target) for row in rows]
            means.append(statistics.fmean(known_share(*pair) for pair in pairs))
        assert figures["ood_generalization"] == pytest.approx(statistics.fmean(means))
    assert report.samples["ood_generalization"] == 4


def test_generated_answers_are_compared_whole_and_in_part(reported: Reported) -> None:
    edited, records, report = reported
    for memory, figures in ((False, report.before), (True, report.after)):
        texts = [answer_of(edited, record.prompt, 6, memory=memory, end=1) for record in records]
        exact = [text == record.target for text, record in zip(texts, records, strict=True)]
        contains = [record.target in text for text, record in zip(texts, records, strict=True)]
        assert figures["generated_exact"] == pytest.approx(statistics.fmean(exact))
        assert figures["generated_contains"] == pytest.approx(statistics.fmean(contains))
    assert report.after["generated_contains"] > report.before["generated_contains"]


@pytest.mark.parametrize("kind", ["matrix", "lookup"])
def test_routing_is_the_share_of_rephrases_that_open_the_memory_of_their_edit(tmp_path: Path, kind: str) -> None:
    syllables = [f"{c}{v}" for c in "bdfgklmnpr" for v in "aeiou"]
    texts = [[f"{syllables[(7 * n + 3 * k) % 50]} {syllables[(11 * n + k) % 50]}" for k in range(5)] for n in range(6)]
    edits = [Edit(f"edit-{n}", f"za {syllables[n]}", "be", rephrases=tuple(texts[n])) for n in range(6)]
    edited = edited_model(tmp_path, kind=kind, memories=6 if kind == "lookup" else 2, edits=edits)
    report = evaluate(tmp_path / "memory", EvalSettings(generate=False), load=CPU)
    hits = [
        prompt_choice(edited, row_of(edited, text, "be")) == (number if kind == "lookup" else number % 2)
        for number, edit in enumerate(edits)
        for text in edit.rephrases
    ]
    assert 0 < sum(hits) < len(hits)
    assert report.after["routing"] == pytest.approx(statistics.fmean(hits))
    assert (report.before["routing"], report.samples["routing"]) == (0.0, 30)
    away = [replace(edit, prompt=f"{edit.prompt} zo") for edit in edits]
    path = tmp_path / "others.jsonl"
    path.write_text("\n".join(json.dumps(record.as_dict()) for record in away))
    settings = EvalSettings(dataset=str(path), generate=False)
    assert "routing" not in evaluate(tmp_path / "memory", settings, load=CPU).after


def test_the_json_form_has_the_keys_of_lm_eval(reported: Reported) -> None:
    report = reported[2]
    content = report.as_json()
    assert {"results", "config", "versions", "n-samples", "higher_is_better", "date"} <= content.keys()
    assert content["results"] == {"records": {**report.asked, **report.after, "before": report.before}}
    assert report.before.keys() == report.after.keys()
    assert content["n-samples"]["records"]["edits"] == 6
    higher = content["higher_is_better"]["records"]
    assert higher.keys() == report.figures.keys()
    assert next(iter(higher)) == "as_taught"
    lower = {name.partition("/")[0] for name, better in higher.items() if not better}
    assert lower - {"other_question", "other_subject", "mentioned"} == {
        "perplexity",
        "perplexity_median",
        "perplexity_clipped",
    }


@pytest.mark.parametrize(
    ("gates", "error", "says"),
    [
        ({}, None, ()),
        ({"reliability": 0.9, "locality": 1.0}, None, ()),
        ({"reliability": 0.91}, GateFailedError, ("reliability is 0.900",)),
        ({"reliability": 0.5, "locality": 1.01}, GateFailedError, ("locality",)),
        ({"reliability": 1.0, "perplexity": 3.0}, GateFailedError, ("reliability", "perplexity is 4.000, not 3")),
        ({"perplexity": 4.0}, None, ()),
        ({"perplexity": 5.0}, None, ()),
        ({"perplexity_clipped": 3.9}, GateFailedError, ("perplexity_clipped",)),
        ({"reliabilty": 0.5}, SettingsError, ("reliabilty", "reliability, locality")),
        ({"generalization": 0.5}, SettingsError, ("generalization",)),
    ],
)
def test_gates(gates: dict[str, float], error: type[WiseError] | None, says: tuple[str, ...]) -> None:
    after = {"reliability": 0.9, "locality": 1.0, "perplexity": 4.0, "perplexity_clipped": 4.0}
    report = EvalReport("edits", after, after, {"edits": 1}, {}, 0.0, 0)
    with pytest.raises(error) if error else contextlib.nullcontext() as caught:
        report.check(gates)
    for text in says:
        assert caught is not None
        assert text in str(caught.value)
    assert error is None or error.exit_code == (1 if error is GateFailedError else 2)
