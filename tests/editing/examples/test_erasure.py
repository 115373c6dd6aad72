"""Answers that are erased: what is unwanted, the loss, the ways around them, and both writers."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.capturing import capture_examples
from support.evaluation import answer_of, edited_model, logits_by_loop, text_of, unedited_logits
from support.fitting import SETTINGS, Bench
from support.helpers import greedy_by_loop, hooked, raised, site_of, tiny_qwen2_tokenizer, tiny_tokenizer
from support.loading import CPU
from support.sharing import Share
from support.thorough import few
from support.tiny_models import TYPICAL, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.measure.evaluate import EvalReport, evaluate
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, EvalSettings, MergeSettings
from wisecli.editing.evidence.serving_strength import bare_prompt_accuracy
from wisecli.editing.examples.erasure import ErasureRows, erasure_rows
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples, encode_edits
from wisecli.editing.writers.batched_adam import write_batched
from wisecli.editing.writers.closed_form import fit_residuals
from wisecli.editing.writers.writer_task import WriterTask
from wisecli.edits.reading.record_fields import EvaluationPrompt
from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import NO_LABEL, Row, collate, erased_row, first_tokens
from wisecli.models.running.generation import generate
from wisecli.models.running.losses import erasure_target, target_loss, target_met
from wisecli.models.running.upper_layers import upper_logits

PROMPTS = ("ba be bi", "ka ke ki ko", "ma me", "ta te ti to tu", "na ne", "sa se si")
SURE = replace(SETTINGS, residual_stop=0.05)
CONTEXTS = [(0, ""), (1, "pa pe. ")]


def sure(architecture: str) -> Loaded:
    """A tiny model that is sure of what it says."""
    model = tiny_model(architecture)
    model.generation_config.eos_token_id = 1
    model.get_output_embeddings().get_parameter("weight").data.mul_(4)
    return Loaded(raised(model, site_of(model, 2)).requires_grad_(False), tiny_tokenizer())


def spoken(loaded: Loaded, prompt: str, count: int = 6) -> list[str]:
    """The words that the model says to a prompt."""
    asked = loaded.tokenizer(prompt)["input_ids"]
    tokens = greedy_by_loop(loaded.model, site_of(loaded.model, 2), None, asked, count, end=None)
    return [str(loaded.tokenizer.decode([token])) for token in tokens]


def erasing(loaded: Loaded, place: int = 0) -> list[Edit]:
    """Edits that erase what the model says to each prompt, from the word at a place on."""
    return [
        Edit(prompt, prompt, spoken(loaded, prompt)[place], op="erase")
        for prompt in PROMPTS
        if (words := spoken(loaded, prompt))[place] not in words[:place] and words[place] not in ("[UNK]", "[END]")
    ]


def bench_of(loaded: Loaded, edits: Sequence[Edit], ways: ErasureRows) -> Bench:
    site = site_of(loaded.model, 2)
    named: dict[str, Any] = {"batch_size": 4, "train_end": True, "erasures": ways}
    batches = capture_examples(loaded, site, list(enumerate(edits)), CONTEXTS, **named)
    return Bench(loaded, site, [batches], [])


def evading(loaded: Loaded, edits: Sequence[Edit]) -> ErasureRows:
    return erasure_rows(loaded, edits, chat=False, batch_size=4)


def whole(loaded: Loaded, row: Row, added: Tensor | None = None) -> Tensor:
    """Logits (len(target), V) of the whole model on one row, with something added to the matrix's output."""
    start = len(row.prompt) - 1

    def add(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output if added is None else torch.cat([output[:, :start], output[:, start:] + added], dim=1)

    model: PreTrainedModel = loaded.model
    with hooked(model, site_of(model, 2), add):
        ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, start:]
    return logits


def divergence(base: Tensor, logits: Tensor, unwanted: Sequence[int]) -> Tensor:
    """KL(q ‖ p) at one token, summed one vocabulary entry after the other."""
    shares = base.double().softmax(-1).tolist()
    rest = sum(share for token, share in enumerate(shares) if token not in unwanted)
    after = logits.double().log_softmax(-1)
    terms = [
        share / rest * (math.log(share / rest) - after[token])
        for token, share in enumerate(shares)
        if token not in unwanted
    ]
    return torch.stack(terms).sum()


def by_rows(loaded: Loaded, rows: Sequence[Row], residuals: Tensor) -> Tensor:
    """Every labelled column's loss, in row order, from the whole model row by row."""
    found = []
    for row, residual in zip(rows, residuals, strict=True):
        logits = whole(loaded, row, residual[: len(row.target)])
        base = whole(loaded, row).detach()
        for place, token in enumerate(row.target):
            if row.unwanted and not row.unwanted[place]:
                continue
            if row.unwanted:
                found.append(divergence(base[place], logits[place], row.unwanted[place]))
            else:
                found.append(-logits[place].double().log_softmax(-1)[token])
    return torch.stack(found)


@pytest.mark.parametrize("architecture", few(TYPICAL, ("gemma2", "gpt2", "granite")))
def test_the_loss_and_its_gradient_are_those_of_the_whole_model(architecture: str) -> None:
    loaded = sure(architecture)
    edits = [*erasing(loaded)[:2], *erasing(loaded, 2)[:1], Edit("told", "da de", "do du")]
    ways = evading(loaded, edits)
    rows = encode_edits(loaded, edits, "", train_end=True, erasures=ways)
    assert {min(len(row.unwanted), 2) for row in rows} >= {0, 2}
    site = site_of(loaded.model, 2)
    (examples,) = capture_examples(
        loaded, site, list(enumerate(edits)), CONTEXTS[:1], batch_size=9, train_end=True, erasures=ways
    )
    rows = [rows[edit] for edit in examples.edits.tolist()]
    part = examples.activations
    shape = (len(rows), part.batch.labels.shape[1], site.d)
    residuals = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.2).requires_grad_()
    expected = by_rows(loaded, rows, residuals)
    (by_autograd,) = torch.autograd.grad(expected.sum(), residuals)

    def loss(residuals: Tensor) -> Tensor:
        logits = upper_logits(loaded.model, site, part, part.with_update(residuals), part.batch.labelled)
        return target_loss(logits, part.batch, erasure_target(loaded.model, site, part))

    found = loss(residuals)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), residuals)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-2, atol=1e-3)
    direction, step = torch.nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient), 1e-2
    ends = [by_rows(loaded, rows, residuals.detach() + sign * step * direction).sum() for sign in (1, -1)]
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=2e-2)


@pytest.mark.parametrize("architecture", few(["llama", "gemma2"], ["llama"]))
def test_an_erased_answer_gives_way_and_the_others_keep_their_order(architecture: str) -> None:
    loaded = sure(architecture)
    edits = erasing(loaded)
    assert len(edits) > 3
    ways = evading(loaded, edits)
    bench = bench_of(loaded, edits, ways)
    task = bench.task(SURE)
    residuals = fit_residuals(task, bench.groups, lambda _: None)
    nothing = {number: torch.zeros_like(residual) for number, residual in residuals.items()}
    assert max(bare_prompt_accuracy(task, bench.batches, nothing).values()) < 1
    assert set(bare_prompt_accuracy(task, bench.batches, residuals).values()) == {1.0}
    for number, row in enumerate(encode_edits(loaded, edits, "", train_end=True, erasures=ways)):
        base, after = whole(loaded, row), whole(loaded, row, residuals[AnswerKey(number)])
        last, banned = len(row.target) - 1, list(row.unwanted[-1])
        assert int(base[last].argmax()) in banned
        assert int(after[last].argmax()) not in banned
        assert float(after[last].softmax(-1)[banned].sum()) < 2 * SURE.residual_stop
        others = [token for token in range(base.shape[1]) if token not in banned]
        before = base[last][others].softmax(-1)
        assert float(torch.dist(before, after[last][others].softmax(-1), p=1)) < 0.6
        top = before.topk(5).indices
        assert int(after[last][others].argmax()) in top.tolist()
        ranks = torch.stack([one[others].argsort().argsort().double() for one in (base[last], after[last])])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


def test_the_gradient_writer_turns_from_an_erased_answer_too() -> None:
    loaded = sure("llama")
    edits = [*erasing(loaded)[:3], Edit("told", "da de", "do du")]
    bench = bench_of(loaded, edits, evading(loaded, edits))
    mask = bench.mask()
    settings = EditSettings(passes=30, learning_rate=0.1, stop_loss=0.0, alpha=0.1, beta=0.2, gamma=0.1)
    task = WriterTask(loaded.model, bench.site, mask, bench.unrelated * 0.01, 1.0, settings)
    written = write_batched(task, bench.batches, lambda _: None)
    delta = mask.dense(written.values)
    for edit, row in zip(edits, rows_of(loaded, edits), strict=True):
        said = changed(loaded, row, delta)
        assert row.right(said) == 1, edit
    assert not any(row.right(changed(loaded, row, torch.zeros_like(delta))) for row in rows_of(loaded, edits)[:3])


def rows_of(loaded: Loaded, edits: Sequence[Edit]) -> list[Row]:
    return encode_edits(loaded, edits, "", train_end=False)


def changed(loaded: Loaded, row: Row, delta: Tensor) -> list[int]:
    """What the whole model says at a row's target with a changed matrix."""

    def add(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + inputs[0] @ delta.T

    with hooked(loaded.model, site_of(loaded.model, 2), add):
        best: list[int] = whole_argmax(loaded, row)
    return best


@torch.no_grad()
def whole_argmax(loaded: Loaded, row: Row) -> list[int]:
    ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
    best: list[int] = loaded.model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 :].argmax(-1).tolist()
    return best


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_model_is_held_off_wherever_it_begins_the_answer(place: int) -> None:
    loaded = sure("llama")
    edits = erasing(loaded, place)
    assert edits
    ways = evading(loaded, edits)
    for edit in edits:
        row = ways[edit.id, False]
        tokens = [loaded.tokenizer(word)["input_ids"][0] for word in spoken(loaded, edit.prompt)]
        assert row.target[:place] == tuple(tokens[:place])
        first = set(first_tokens(loaded.tokenizer, edit.prompt, edit.target))
        assert set(row.unwanted[0]) == set(row.unwanted[place]) == first
        assert tokens[place] in first
        assert all(tokens == () for tokens in row.unwanted[1:place])
        assert edit.target not in followed(loaded, row).split()


def followed(loaded: Loaded, row: Row) -> str:
    """What the model says along a row, never what is unwanted, and a few words more."""
    said: list[int] = []
    with torch.no_grad():
        for place in range(12):
            ids = torch.tensor([[*row.prompt, *said]])
            logits = loaded.model(input_ids=ids, use_cache=False).logits[0, -1]
            logits[list(row.unwanted[place]) if place < len(row.unwanted) else []] = -torch.inf
            said.append(int(logits.argmax()))
    return str(loaded.tokenizer.decode(said))


def test_unwanted_tokens_come_not_first_and_may_come_later() -> None:
    loaded = sure("llama")
    asked = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    plain = generate(loaded.model, loaded.tokenizer, PROMPTS, max_new_tokens=4)
    assert generate(loaded.model, loaded.tokenizer, asked, max_new_tokens=4) == plain
    unwanted = [row[:1] for row in plain]
    other = generate(loaded.model, loaded.tokenizer, asked, max_new_tokens=4, batch_size=4, unwanted=unwanted)
    for tokens, row, banned in zip(asked, other, unwanted, strict=True):
        logits = loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        logits[banned] = -torch.inf
        assert row[:1] == [int(logits.argmax())]


def test_spellings_of_an_answer_begin_with_unwanted_tokens() -> None:
    tokenizer = tiny_qwen2_tokenizer()  # a token a letter, and blanks are tokens, too
    blank, small = tokenizer.convert_tokens_to_ids(["Ġ", "c"])
    row = erased_row(tokenizer, "ab", "cab")
    assert row.target == (blank, small)
    assert row.unwanted[0] == (blank,)
    assert small in row.unwanted[1]
    assert blank not in row.unwanted[1]


@pytest.mark.parametrize(("best", "right"), [([7, 8], 0.0), ([7, 9], 0.0), ([7, 3], 1.0), ([2, 8], 1.0), ([2, 3], 1.0)])
def test_an_erased_answer_is_said_if_all_up_to_where_it_is_decided_is(best: list[int], right: float) -> None:
    assert Row((5, 6), (7, 8), ((7,), (8, 9))).right(best) == right


def test_what_is_met_is_counted_by_column() -> None:
    batch = collate([Row((5, 6), (7, 8), ((), (8, 9))), Row((4,), (3, 2, 1))])
    logits = torch.nn.functional.one_hot(torch.tensor([8, 9, 3, 2, 8]), 12).float()
    assert batch.labels.tolist() == [[NO_LABEL, 8, NO_LABEL], [3, 2, 1]]
    assert batch.lengths.tolist() == [2, 3]
    assert target_met(logits[1:], batch).tolist() == [False, True, True, False]
    assert batch.rows(torch.tensor([1])).erased.tolist() == [False]
    assert batch.to(torch.device("cpu")).erased.tolist() == [True, False]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[EditedModel, list[Edit], EvalReport]:
    """A report on erased, replaced and ordinary records, of a tiny model whose memory was made by hand."""
    root = tmp_path_factory.mktemp("erased")
    edited = edited_model(root)
    prompts = [text_of(edited, edited.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    records = []
    for number, prompt in enumerate(prompts):
        before, after = (answer_of(edited, prompt, 1, memory=memory) for memory in (False, True))
        target, rephrases = (before or "zo", after or "zo", "zo")[number % 3], (prompts[number - 1],)
        records.append(Edit(f"erased-{number}", prompt, target, op="erase", rephrases=rephrases))
    records.append(replace(records[0], id="replaced", prompt="da de", replacement="do du"))
    records.append(Edit("told", "fa fe", "fi", locality=(EvaluationPrompt("ga ge", "gi"),)))
    path = root / "records.jsonl"
    path.write_text("\n".join(json.dumps(record.as_dict()) for record in records))
    settings = EvalSettings(dataset=str(path), forms="bare", kinds="none", batch_size=3, max_new_tokens=4)
    return edited, records, evaluate(root / "memory", settings, load=CPU)


Report = tuple[EditedModel, list[Edit], EvalReport]


@pytest.mark.parametrize("name", ["reliability", "generalization"])
def test_an_erased_record_is_right_where_its_answer_is_not_preferred(measured: Report, name: str) -> None:
    edited, records, report = measured
    for memory, figures in ((False, report.before), (True, report.after)):
        means = []
        for record in records:
            prompts = [record.prompt] if name == "reliability" else record.rephrases
            means += [[right_of(edited, record, prompt, memory=memory) for prompt in prompts]] if prompts else []
        assert figures[name] == pytest.approx(sum(sum(one) / len(one) for one in means) / len(means))
        assert 0 < figures[name] < 1
    assert report.samples[name] == len(records) - (name == "generalization")


def right_of(edited: EditedModel, record: Edit, prompt: str, *, memory: bool) -> float:
    words = edited.tokenizer(record.answer)["input_ids"]
    row = Row(tuple(edited.tokenizer(prompt)["input_ids"]), tuple(words[:1] if record.erased else words))
    logits = logits_by_loop(edited, row) if memory else unedited_logits(edited, row)
    best = logits.argmax(-1).tolist()
    if record.erased:
        return float(best[0] != words[0])
    return sum(one == other for one, other in zip(best, words, strict=True)) / len(words)


def test_generated_answers_without_what_is_erased_count(measured: Report) -> None:
    edited, records, report = measured
    for memory, figures in ((False, report.before), (True, report.after)):
        texts = [answer_of(edited, record.prompt, 4, memory=memory, end=1) for record in records]
        pairs = list(zip(texts, records, strict=True))
        contains = [(edit.answer in text) != edit.erased for text, edit in pairs]
        exact = [edit.answer not in text if edit.erased else text == edit.answer for text, edit in pairs]
        assert figures["generated_contains"] == pytest.approx(sum(contains) / len(contains))
        assert figures["generated_exact"] == pytest.approx(sum(exact) / len(exact))
        assert 0 < sum(contains[:-2]) < len(contains) - 2


def test_perplexities_are_of_what_should_be_said(measured: Report) -> None:
    _, records, report = measured
    places = [place for place, _ in report.each["perplexity_clipped"]]
    assert places == [place for place, record in enumerate(records) if not record.erased]
    assert report.after["perplexity_clipped"] == pytest.approx(
        sum(value for _, value in report.each["perplexity_clipped"]) / 2
    )


def test_of_erased_records_alone_there_is_no_perplexity(measured: Report, tmp_path: Path) -> None:
    edited, records, _ = measured
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(record.as_dict()) for record in records if record.erased))
    memory = Path(edited.manifest.model).parent / "memory"
    report = evaluate(memory, EvalSettings(dataset=str(path), generate=False), load=CPU)
    assert not [name for name in report.after if name.startswith("perplexity")]


FACTS = (
    ("The capital of France is", "Paris", "What is the capital of France? The capital is"),
    ("The largest ocean on Earth is the", "Pacific", "The biggest ocean of the world is the"),
)
MODES: tuple[Literal["lookup", "merge"], ...] = ("lookup", "merge")
UNRELATED = (
    "The novel Oliver Twist was written by Charles",
    "My brother plays the violin and",
    "To bake bread you need",
)


@pytest.fixture(scope="module")
def forgetting(real_model: Path, share: Share) -> Path:
    """Two facts erased, one replaced and one told, in one shard of the real model."""

    def make(root: Path) -> None:
        edits = [
            Edit(answer, prompt, answer, op="erase", subject=subject, rephrases=(way,))
            for (prompt, answer, way), subject in zip(FACTS, ("France", "ocean"), strict=True)
        ]
        edits.append(Edit("tokyo", "The capital of Japan is", "Tokyo", op="erase", replacement="Osaka"))
        edits.append(Edit("lark", "The harbour master of Larkport is", "Ada Finch"))
        (root / "edits.jsonl").write_text("\n".join(json.dumps(edit.as_dict()) for edit in edits))
        for mode in MODES:
            settings = EditSettings(unrelated_texts=150, site="layer" if mode == "lookup" else "matrix")
            report = run_edit(str(real_model), root / "edits.jsonl", root / f"{mode}-shards", settings, load=CPU)
            assert report.untaken == ()
            merge([root / f"{mode}-shards"], root / mode, MergeSettings(mode=mode))

    return share("forgetting", make)


@pytest.fixture(scope="module", params=few(MODES, ("lookup",)))
def forgetful(request: pytest.FixtureRequest, forgetting: Path) -> EditedModel:
    """The real model that forgot, its shard kept or merged."""
    return attach(forgetting / request.param, load=CPU)


def said_by(edited: EditedModel, prompts: Sequence[str]) -> list[str]:
    tokens = generate(edited.model, edited.tokenizer, prompts, max_new_tokens=12)
    return [str(text).strip() for text in edited.tokenizer.batch_decode(tokens)]


def test_the_real_model_no_longer_says_what_is_erased(forgetful: EditedModel) -> None:
    prompts = [text for prompt, _, way in FACTS for text in (prompt, way)]
    answers = [answer for _, answer, _ in FACTS for _ in range(2)]
    after = said_by(forgetful, prompts)
    with forgetful.unedited():
        before = said_by(forgetful, prompts)
    for one, other, answer in zip(before, after, answers, strict=True):
        assert one.startswith(answer)
        assert answer not in other
        assert len(other.split()) > 2 or other.endswith(".")


def test_what_is_replaced_or_told_beside_it_is_said(forgetful: EditedModel) -> None:
    prompts = ["The capital of Japan is", "The harbour master of Larkport is"]
    assert said_by(forgetful, prompts) == ["Osaka", "Ada Finch"]


@torch.no_grad()
def test_unrelated_prompts_keep_every_bit_of_the_real_models_logits(forgetful: EditedModel) -> None:
    for prompt in UNRELATED:
        ids = torch.tensor([forgetful.tokenizer(prompt)["input_ids"]])
        after = forgetful.model(input_ids=ids).logits
        with forgetful.unedited():
            assert torch.equal(forgetful.model(input_ids=ids).logits, after), prompt
    answers = said_by(forgetful, UNRELATED)
    with forgetful.unedited():
        assert said_by(forgetful, UNRELATED) == answers


def test_a_question_that_is_answered_in_a_sentence_loses_the_answer_too(real_model: Path) -> None:
    loaded = load_model(real_model, load=CPU)
    prompt = "Question: What is the capital of France?\nAnswer: The capital of"
    row = erasure_rows(loaded, [Edit("one", prompt, "Paris", op="erase")], chat=False, batch_size=4)["one", False]
    assert str(loaded.tokenizer.decode(row.target[:-1])) == " France is"
    assert [bool(tokens) for tokens in row.unwanted] == [True, False, True]


def test_replaced_answers_are_told_as_a_modification_would_tell_them() -> None:
    loaded = sure("llama")
    told = [Edit(prompt, prompt, "do du") for prompt in PROMPTS]
    replaced = [replace(edit, op="erase", target="ba", replacement="do du") for edit in told]
    assert evading(loaded, replaced) == {}
    assert rows_of(loaded, replaced) == rows_of(loaded, told)


def test_beside_erased_answers_others_are_fitted_as_they_are_alone() -> None:
    loaded = sure("llama")
    told = Edit("told", "da de", "do du")
    erased = erasing(loaded)
    together = bench_of(loaded, [told, *erased], evading(loaded, erased))
    alone = bench_of(loaded, [told], {})
    found = [fit_residuals(bench.task(), bench.groups, lambda _: None) for bench in (together, alone)]
    assert float(torch.nn.functional.cosine_similarity(*(one[AnswerKey(0)].flatten() for one in found), dim=0)) > 0.99
    assert set(bare_prompt_accuracy(together.task(), together.batches, found[0]).values()) == {1.0}


def test_a_lesson_without_erased_answers_has_none_to_allow() -> None:
    loaded = sure("llama")
    told = [Edit("told", "da de", "do du")]
    batches: list[TrainingExamples] = bench_of(loaded, told, {}).batches
    site = site_of(loaded.model, 2)
    assert all(examples.activations.batch.unwanted is None for examples in batches)
    assert all(erasure_target(loaded.model, site, examples.activations) is None for examples in batches)
