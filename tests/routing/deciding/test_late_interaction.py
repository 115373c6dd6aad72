"""Which edit a prompt means: scores by loops over tokens, and one decision whoever asks and however it is read."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from reference.wise import edit_probs
from support.helpers import WORDS, manifest_for, memory_for, save_tiny
from support.loading import CPU
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.memory_manifest import write_memory
from wisecli.commands.checkpoint.explain import explain
from wisecli.commands.checkpoint.generate import generate
from wisecli.editing.router_training.token_states import ReadSites, prompt_states, special_tokens, token_states
from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.evaluation.teacher_forcing import _routes
from wisecli.io.checkpoint import Checkpoint
from wisecli.memory.fitting.late_interaction_fitting import fit_late_interaction
from wisecli.models.layout.site import find_site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.models.running.generation import left_padded
from wisecli.progress import ignore_progress
from wisecli.routing.deciding import fact_candidates
from wisecli.routing.deciding.decision import Decision, WindowStates
from wisecli.routing.deciding.late_interaction import (
    HOPELESS,
    LATE_INTERACTION,
    MAX_COMPARED_TOKENS,
    LateInteraction,
    ProjectedPrompts,
    compared_tokens,
    starts_with_word,
)
from wisecli.routing.deciding.prompt_window import UNROUTED
from wisecli.routing.deciding.prompt_words import LETTER, SEPARATOR, TOKEN_CHARS
from wisecli.routing.memories.fact_memory import FactMemory
from wisecli.routing.memories.subject_tensors import SubjectToken, fuzzy_match_tensors, subject_match_tensors

PROMPTS = [" ".join(WORDS[first : first + length]) for first, length in ((0, 5), (9, 4), (20, 8))]
EDITS = [Edit(f"edit {number}", prompt, "be") for number, prompt in enumerate(PROMPTS)]
OTHERS = [" ".join(WORDS[first : first + length]) for first, length in ((33, 6), (40, 5))]


def random_heads(d: int, layer: int, loaded: Loaded, unrelated: list[str]) -> RouterHeads:
    generator = torch.Generator().manual_seed(3)
    read = token_states(
        loaded, loaded_site(loaded).below(layer), unrelated, batch_size=4, on_progress=ignore_progress, stage=""
    )
    return RouterHeads(
        torch.randn(2, 8, d, generator=generator),
        torch.randn(2, 8, generator=generator) / 4,
        torch.zeros(2, d),
        torch.zeros(2),
        torch.full((2,), 30.0),
        torch.full((2,), 0.8),
        special_tokens(loaded),
        torch.tensor([layer]),
        read.states,
        read.text,
    )


def loaded_site(loaded: Loaded):  # type: ignore[no-untyped-def]
    base = Path(loaded.model.config._name_or_path)
    return find_site(base, Checkpoint(base), 2)


@pytest.fixture
def edited(tmp_path: Path) -> EditedModel:
    """A tiny model with a lookup of three edits, whose prompts' tokens are compared in layer 0."""
    base = save_tiny(tmp_path / "base", "llama")
    loaded = load_model(base, load=CPU)
    site = find_site(base, Checkpoint(base), 2)
    memory = memory_for(loaded.model, site, kind="lookup", memories=3)
    states = prompt_states(
        loaded,
        ReadSites(site.below(0), None),
        list(enumerate(EDITS)),
        batch_size=4,
        on_progress=ignore_progress,
        stage="",
    )
    heads = random_heads(site.d, 0, loaded, OTHERS)
    fitted = fit_late_interaction(heads, states.compared, 3)
    memory = replace(memory, tensors={**memory.tensors, **fitted.tensors}, thresholds=(0.5,) * 3)
    (tmp_path / "memory").mkdir()
    write_memory(tmp_path / "memory", manifest_for(base, memory, EDITS))
    return attach(tmp_path / "memory", load=CPU)


# --- scores ---


def test_scores_are_those_of_loops_over_tokens(edited: EditedModel) -> None:
    tensors = {name: edited.manifest.memory.tensors[name] for name in LATE_INTERACTION}
    meaning = LateInteraction(tensors, 3)
    states, there = torch.randn(4, 9, edited.manifest.site.d), torch.rand(4, 9) < 0.6
    there[:, 2] = True
    found = meaning(states, there)
    for row in range(4):
        expected = edit_probs(tensors, states[row, there[row]], 3)
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=2e-3, atol=1e-4)
    projected = meaning.project(states, there)
    each = torch.stack([meaning.edit_prob(projected, edit) for edit in range(3)], 1)
    torch.testing.assert_close(each[found > 0], found[found > 0], rtol=1e-4, atol=1e-6)
    assert bool((each[found == 0] < HOPELESS).all())
    assert bool((found > 0).any())
    assert meaning.edit_prob(projected, 3).tolist() == [0.0] * 4


def many_prompts(count: int) -> dict[str, Tensor]:
    """Tensors of so many edits with one kept prompt each, of two tokens for subjects and three for relations."""
    chance = torch.Generator().manual_seed(5)
    vectors = F.normalize(torch.randn(5 * count, 8, generator=chance), dim=-1)
    every = torch.arange(count)
    return {
        "late_interaction.proj_weight": torch.randn(2, 8, 12, generator=chance),
        "late_interaction.proj_bias": torch.randn(2, 8, generator=chance),
        "late_interaction.logit_scale": torch.full((2,), 12.0),
        "late_interaction.logit_offset": torch.full((2,), 0.45),
        "late_interaction.prompt_token_embeddings": vectors,
        "late_interaction.token_to_prompt": torch.cat([every.repeat_interleave(2), count + every.repeat_interleave(3)]),
        "late_interaction.token_weights": torch.cat([torch.full((2 * count,), 1 / 2), torch.full((3 * count,), 1 / 3)]),
        "late_interaction.prompt_to_edit": every,
        "late_interaction.special_token_ids": torch.tensor([0]),
    }


def test_tokens_of_edits_are_those_of_their_first_prompts() -> None:
    tensors = many_prompts(4)
    meaning = LateInteraction({**tensors, "late_interaction.prompt_to_edit": torch.tensor([0, 0, 1, 3])}, 5)
    found = meaning.edit_tokens(torch.tensor([3, 0, 2, 3]))
    subject, relation = tensors["late_interaction.prompt_token_embeddings"].split([8, 12])
    expected = [(subject[6:8], relation[9:12]), (subject[:2], relation[:3]), (subject[:0], relation[:0])]
    for own, other in zip(found, [*expected, expected[0]], strict=True):
        assert torch.equal(own[0], other[0])
        assert torch.equal(own[1], other[1])


def test_an_edit_counts_where_its_subject_is_likely_or_among_the_likeliest() -> None:
    tensors, count = many_prompts(60), 60
    meaning = LateInteraction(tensors, count)
    states, there = torch.randn(6, 7, 12, generator=torch.Generator().manual_seed(1)), torch.ones(6, 7).bool()
    there[0, 3:] = False
    found = meaning(states, there)
    dropped = 0
    for row in range(6):
        both = torch.tensor(edit_probs(tensors, states[row, there[row]], count))
        alone = {**tensors, "late_interaction.logit_scale": torch.tensor([12.0, 0.0])}
        subject = torch.tensor(edit_probs(alone, states[row, there[row]], count)) * 2
        kept = (subject >= 0.25) | (subject >= subject.topk(8).values[-1] - 1e-6)
        torch.testing.assert_close(found[row], both.where(kept, 0.0), rtol=1e-3, atol=1e-6)
        assert both.masked_fill(kept, 0.0).max() < 0.25
        dropped += int((~kept).sum())
    assert dropped > 20
    # A row's figures do not depend on who else is in the batch, nor on how many rows go through at a time.
    torch.testing.assert_close(
        torch.cat([meaning(*one) for one in zip(states.split(1), there.split(1), strict=True)]), found
    )


def test_an_edits_own_prompt_is_sure_and_shares_add_up(edited: EditedModel) -> None:
    tensors = edited.manifest.memory.tensors
    count = len(tensors["late_interaction.prompt_to_edit"])
    whole = torch.zeros(2 * count).index_add(
        0, tensors["late_interaction.token_to_prompt"].long(), tensors["late_interaction.token_weights"].float()
    )
    torch.testing.assert_close(whole, torch.ones(2 * count))
    for number, prompt in enumerate(PROMPTS):
        sure = decision_of(edited, prompt).scores
        assert int(sure[0].argmax()) == number
        assert float(sure[0, number]) > 0.8


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([5, 6, 7, 8], [1, 2, 3]),  # all but the first, on which attention rests
        ([5, 6, 7, 8, 1, 9, 9, 9, 9, 9], [5, 6, 7, 8, 9]),  # what follows the special token
        ([5, 6, 7, 8, 8, 3, 9, 1, 9, 9], [1, 2, 3, 4]),  # the stretches after the first are too short to ask anything
        ([5, 6, 1, 7], [1, 3]),  # no stretch is long: all of it
        ([5, *[6] * (MAX_COMPARED_TOKENS + 20)], list(range(21, MAX_COMPARED_TOKENS + 21))),  # the last of many
    ],
)
def test_what_is_asked_last_is_compared(ids: list[int], kept: list[int]) -> None:
    row = torch.tensor([ids])
    first = torch.arange(len(ids))[None] == 0
    found = compared_tokens(row, torch.ones_like(row, dtype=torch.bool), first, torch.tensor([1, 3]))
    assert found[0].nonzero().flatten().tolist() == kept


# --- decisions ---


def decision_of(edited: EditedModel, prompt: str) -> Decision:
    return edited.decide(batch_of(edited, prompt))


def batch_of(edited: EditedModel, prompt: str):  # type: ignore[no-untyped-def]
    return collate([Row(tuple(edited.tokenizer(prompt)["input_ids"]), (7, 8, 9))])


def test_of_edits_above_their_thresholds_the_likeliest_answers(edited: EditedModel, tmp_path: Path) -> None:
    """However low the threshold of another is."""
    probs = decision_of(edited, PROMPTS[1]).scores[0]
    assert float(probs[1]) > 2 * float(probs[0]) > 0
    thresholds = (float(probs[0]) / 1000, float(probs[1]) / 2, 1.0)
    (tmp_path / "low").mkdir()
    memory = replace(edited.manifest.memory, thresholds=thresholds)
    write_memory(tmp_path / "low", manifest_for(Path(edited.manifest.model), memory, EDITS))
    decision = decision_of(attach(tmp_path / "low", load=CPU), PROMPTS[1])
    assert (int(decision.memory[0]), int(decision.nearest[0])) == (1, 1)
    assert float(decision.score_ratio[0]) == pytest.approx(2, rel=1e-3)


@torch.no_grad()
def chosen_by_the_layer(
    edited: EditedModel, parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """The edits that answered the tokens of each pass, one pass after the other on one cache."""
    noted: list[Tensor] = []
    add = type(edited.routed).add

    def noting(own, answer, keys, chosen):  # type: ignore[no-untyped-def]
        noted.append(own.memory_of_choice(chosen))
        return add(own, answer, keys, chosen)

    cache = DynamicCache(config=edited.model.config)
    with monkeypatch.context() as patched:
        patched.setattr(type(edited.routed), "add", noting)
        for part in parts:
            edited.model(torch.tensor([part]), **{CACHE_ARGUMENT: cache})
    return [chosen[0].tolist() for chosen in noted]


def test_own_prompts_open_their_edit_at_their_end_and_others_nothing(
    edited: EditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, prompt in enumerate([*PROMPTS, *OTHERS]):
        ids = edited.tokenizer(prompt)["input_ids"]
        (found,) = chosen_by_the_layer(edited, [ids], monkeypatch)
        assert found == [UNROUTED] * (len(ids) - 1) + [number if number < 3 else UNROUTED]


def test_all_who_ask_what_answers_are_told_the_same(
    edited: EditedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in [*PROMPTS, *OTHERS]:
        ids = edited.tokenizer(prompt)["input_ids"]
        (answer,) = generate(tmp_path / "memory", [prompt], max_new_tokens=5, explain=True, load=CPU)
        report = explain(tmp_path / "memory", prompt, max_new_tokens=5, nearest=3, load=CPU)
        (said,) = edited.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=5, do_sample=False
        )[:, len(ids) :].tolist()
        passes = chosen_by_the_layer(edited, [ids, *([token] for token in said[:-1])], monkeypatch)
        by_layer = [passes[0][-1], *(one for (one,) in passes[1:])]
        assert [step.memory for step in answer.steps] == [
            None if one == UNROUTED else one for one in by_layer[: len(answer.steps)]
        ]
        assert [token.routed for token in report.answer_tokens] == [
            one != UNROUTED for one in by_layer[: len(report.answer_tokens)]
        ]
        batch = collate([Row(tuple(ids), tuple(said))])
        with edited.unedited():
            base = capture(edited.model, edited.manifest.site, batch)
        opened = edited.routed.memory_of_choice(_routes(edited, base))[0, batch.start]
        assert int(opened) == by_layer[0]
        assert len(report.nearest) == 3


def test_a_batch_with_padding_is_decided_as_its_rows_are(edited: EditedModel) -> None:
    rows = [edited.tokenizer(prompt)["input_ids"] for prompt in [*PROMPTS, *OTHERS]]
    ids, mask = left_padded(rows)
    for side in (ids, mask), (right_padded(ids, mask)):
        given, real = side
        output = edited.model.generate(given, attention_mask=real, max_new_tokens=4, do_sample=False, pad_token_id=0)
        if given is ids:
            for row, text in zip(rows, output, strict=True):
                alone = edited.model.generate(
                    torch.tensor([row]),
                    attention_mask=torch.ones(1, len(row)),
                    max_new_tokens=4,
                    do_sample=False,
                    pad_token_id=0,
                )
                assert text[len(ids[0]) :].tolist()[: len(alone[0]) - len(row)] == alone[0, len(row) :].tolist()
        position = (real.cumsum(-1) - 1).clamp(min=0)
        logits = edited.model(given, attention_mask=real, position_ids=position).logits
        for row, own, there in zip(rows, logits, real.bool(), strict=True):
            single = edited.model(torch.tensor([row])).logits[0]
            assert torch.allclose(own[there], single, atol=2e-4)


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def test_a_prompt_read_in_parts_is_decided_by_all_of_it(edited: EditedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, prompt in enumerate(PROMPTS):
        ids = edited.tokenizer(prompt)["input_ids"]
        half = len(ids) // 2
        parts = chosen_by_the_layer(edited, [ids[:half], ids[half:]], monkeypatch)
        assert parts[-1][-1] == number


@torch.no_grad()
def test_a_second_question_behind_a_special_token_is_decided_by_itself(
    edited: EditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(edited.routed, FactMemory)
    late_interaction, outcomes = edited.routed.late_interaction, set()
    late_interaction.logit_offset.fill_(0.55)
    for first, second in product([*PROMPTS, *OTHERS], repeat=2):
        told, asked = (edited.tokenizer(prompt)["input_ids"] for prompt in (first, second))
        passes = chosen_by_the_layer(edited, [told, [7], [1], asked, [9]], monkeypatch)
        # All in one pass through the unedited model, of which only the second question's tokens are compared.
        whole = torch.tensor([[*told, 7, 1, *asked]])
        site = edited.manifest.site.below(0)
        with edited.unedited():
            states = capture(edited.model, site, collate([Row(tuple(whole[0].tolist()), (9,))]), above=False).hidden
        sure = late_interaction(states, torch.arange(whole.shape[1])[None] >= len(told) + 2)[0]
        expected = int(sure.argmax()) if float(sure.max()) > 0.5 else UNROUTED
        assert passes[2] == [UNROUTED]
        assert passes[3] == [UNROUTED] * (len(asked) - 1) + [expected]
        assert set(passes[4]) <= {UNROUTED, expected}
        outcomes.add((passes[0][-1], expected))
    assert any(before == UNROUTED != after for before, after in outcomes)
    assert any(before != UNROUTED == after for before, after in outcomes)


def test_a_forced_edit_answers_from_the_prompts_end_on(edited: EditedModel) -> None:
    ids = torch.tensor([edited.tokenizer(OTHERS[0])["input_ids"]])
    with edited.routed.called_with(forced=1):
        forced = edited.model(ids).logits
    plain = edited.model(ids).logits
    assert torch.equal(forced[:, :-1], plain[:, :-1])
    assert not torch.equal(forced[:, -1], plain[:, -1])


@pytest.fixture
def named(edited: EditedModel, tmp_path: Path) -> EditedModel:
    """The same memory, whose first two edits are about the first two words of their prompts; all else is meant."""
    words = [edited.tokenizer(prompt)["input_ids"][:2] for prompt in PROMPTS[:2]]
    names = subject_match_tensors([*((tuple(SubjectToken((token,), 0.5) for token in own),) for own in words), ()])
    memory = edited.manifest.memory
    tensors = {**memory.tensors, **names, "late_interaction.logit_offset": torch.full((2,), -1.0)}
    (tmp_path / "named").mkdir()
    base = Path(edited.manifest.model)
    write_memory(tmp_path / "named", manifest_for(base, replace(memory, tensors=tensors), EDITS))
    return attach(tmp_path / "named", load=CPU)


def test_a_prompt_that_means_an_edit_must_name_its_subject(named: EditedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    for prompt in [*PROMPTS, *OTHERS, f"{WORDS[1]} {PROMPTS[0]}", f"{WORDS[0]} {OTHERS[0]}"]:
        ids = named.tokenizer(prompt)["input_ids"]
        whole, parts = (chosen_by_the_layer(named, part, monkeypatch)[-1][-1] for part in ([ids], [ids[:2], ids[2:]]))
        assert whole == parts
        known = decision_of(named, prompt)
        assert known.subject_matched is not None
        assert float(known.scores.min()) > 0.9
        assert bool(known.subject_matched[0, whole])
        opened.append(known.subject_matched[0].tolist())
    # The third edit names nobody, so that every prompt may mean it.
    assert opened == [
        [True, False, True],
        [False, True, True],
        [False, False, True],
        [False, False, True],
        [False, False, True],
        [True, False, True],
        [False, False, True],
    ]


# --- names with slips ---

# Every token is its own letters, without a space before it, but for one that parts words; subjects are two words.
PARTING = "do"
SUBJECTS = [(*PROMPTS[0].split()[:3], PARTING, "ti", "mo", "no"), (*PROMPTS[1].split()[:3],)]


def letter_table(vocabulary: dict[str, int]) -> Tensor:
    table = torch.zeros(len(vocabulary), TOKEN_CHARS, dtype=torch.uint8)
    for word, token in vocabulary.items():
        own = [SEPARATOR] if word == PARTING or not word.isalpha() else [LETTER + ord(one) - ord("a") for one in word]
        table[token, : len(own)] = torch.tensor(own, dtype=torch.uint8)
    return table


@pytest.fixture
def spelt(edited: EditedModel, tmp_path: Path) -> EditedModel:
    """The same memory, whose first two edits are about subjects of several tokens and mean every prompt."""
    memory, tokenizer = edited.manifest.memory, edited.tokenizer
    tokens = [tokenizer(" ".join(subject))["input_ids"] for subject in SUBJECTS]
    names = subject_match_tensors(
        [*((tuple(SubjectToken((token,), 1 / len(own)) for token in own),) for own in tokens), ()]
    )
    letters = fuzzy_match_tensors(letter_table(tokenizer.get_vocab()), [*tokens, ()])
    tensors = {**memory.tensors, **names, **letters, "late_interaction.logit_offset": torch.full((2,), -1.0)}
    # Of the edits that mean a prompt the first one that it names answers.
    thresholds = (0.5, 0.55, 0.9)
    (tmp_path / "spelt").mkdir()
    base = Path(edited.manifest.model)
    write_memory(tmp_path / "spelt", manifest_for(base, replace(memory, tensors=tensors, thresholds=thresholds), EDITS))
    return attach(tmp_path / "spelt", load=CPU)


def with_subject(*subject: str) -> str:
    return " ".join(("ka", PARTING, *subject, PARTING, "ke"))


NAMED_WITH_SLIPS = [
    (with_subject(*SUBJECTS[0]), 0),
    (with_subject("ba", "bo", "bi", PARTING, "ti", "mo", "no"), 0),
    (with_subject("ba", "bo", "bi", PARTING, "ti", "me", "no"), 0),  # a slip in each word
    (with_subject("ba", "bo", "bi", PARTING, "ti", "me", "ne"), 2),  # two in one
    (with_subject(SUBJECTS[1][0], "ko", SUBJECTS[1][2]), 2),
    (" ".join(("ba", "bo", "bi", PARTING, "ti", "mo", "no", PARTING, "ke")), 0),
]


def test_a_prompt_that_means_an_edit_may_name_its_subject_with_slips(
    spelt: EditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt, expected in NAMED_WITH_SLIPS:
        ids = spelt.tokenizer(prompt)["input_ids"]
        for cut in range(1, len(ids) - 1):
            assert chosen_by_the_layer(spelt, [ids[:cut], ids[cut:]], monkeypatch)[-1][-1] == expected, (prompt, cut)
        assert chosen_by_the_layer(spelt, [ids], monkeypatch) == [[UNROUTED] * (len(ids) - 1) + [expected]]
        known = decision_of(spelt, prompt).subject_matched
        assert known is not None
        assert known[0].tolist() == [expected == 0, False, True]


def test_rows_with_padding_are_named_as_they_are_alone(spelt: EditedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [spelt.tokenizer(prompt)["input_ids"] for prompt, _ in NAMED_WITH_SLIPS]
    ids, mask = left_padded(rows)
    noted: list[Tensor] = []
    add = type(spelt.routed).add

    def noting(own, answer, keys, chosen):  # type: ignore[no-untyped-def]
        noted.append(own.memory_of_choice(chosen).amax(1))
        return add(own, answer, keys, chosen)

    monkeypatch.setattr(type(spelt.routed), "add", noting)
    for given, real in ((ids, mask), right_padded(ids, mask)):
        spelt.model(given, attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0))
        assert noted.pop().tolist() == [expected for _, expected in NAMED_WITH_SLIPS]
    spelt.model.generate(
        ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False, pad_token_id=0
    )
    assert noted[0].tolist() == [expected for _, expected in NAMED_WITH_SLIPS for _ in range(2)]


def test_only_rows_with_misspelt_names_are_compared_as_they_are_meant(
    spelt: EditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(spelt.routed, FactMemory)
    ids, mask = right_padded(*left_padded([spelt.tokenizer(prompt)["input_ids"] for prompt, _ in NAMED_WITH_SLIPS]))
    table = torch.randn(int(ids.max()) + 1, spelt.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    window = WindowStates(ids, mask.bool(), table[ids])
    before = spelt.routed.candidates(window).last_turn
    meant, nearest = (2, 5), before.decision.nearest.tolist()

    def reversed_tokens(prompts: ProjectedPrompts, *_: object) -> dict[tuple[int, int], ProjectedPrompts]:
        return {
            (row, nearest[row]): ProjectedPrompts(prompts.projected[:, row : row + 1].flip(2), prompts.mask[[row]])
            for row in meant
        }

    monkeypatch.setattr(fact_candidates, "read_as_meant", reversed_tokens)
    after = spelt.routed.candidates(window).last_turn
    for row in range(len(ids)):
        own = before.projected.projected[:, row]
        assert torch.equal(after.projected.projected[:, row], own.flip(1) if row in meant else own)


def test_memories_without_letters_ask_for_the_name_as_it_is(named: EditedModel, spelt: EditedModel) -> None:
    assert isinstance(named.routed, FactMemory)
    assert isinstance(spelt.routed, FactMemory)
    assert named.routed.fuzzy_match is None
    assert spelt.routed.fuzzy_match is not None


@pytest.mark.parametrize("padded", [0, 3])
def test_a_first_word_is_told_from_a_mark(padded: int) -> None:
    before = [0] * padded
    ids = torch.tensor([[*before, 5, 6, 7], [*before, 1, 6, 7], [*before, 5, 1, 7]])
    real = (torch.arange(3 + padded) >= padded).expand(3, -1)
    compared = torch.tensor([[*before, 0, 1, 1], [*before, 0, 1, 1], [*before, 0, 0, 1]]).bool()
    found = starts_with_word(ids, real, compared, torch.tensor([1]))
    assert found.tolist() == [True, False, False]  # a word, a mark, and a word of an earlier turn
