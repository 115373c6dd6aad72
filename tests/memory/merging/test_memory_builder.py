from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
import torch
from reference.wise import residual
from support.drawing import normal, seeded
from torch import Tensor

from wisecli.artifacts.background_stats import BackgroundStats, RouterHeads
from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import FIRST_LANGUAGE, SPACE_CONTEXT, Evidence, Mask, MaskKind, PromptStates, Shard
from wisecli.config import MergeSettings
from wisecli.editing.writers.ridge import PENALTIES, Penalty, solve, statistics
from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.memory.fitting.question_sorts import asked_by_tensor
from wisecli.memory.fitting.router_fitting import Fitted, naming
from wisecli.memory.merging.lookup_keys import Views
from wisecli.memory.merging.memory_builder import lookup, matrices, pack, refit, solve_exactly
from wisecli.memory.merging.merge_methods import Recipe, merge_deltas
from wisecli.memory.merging.merged_evidence import MergedEvidence, join_evidence
from wisecli.memory.merging.removal import solved, solved_anew
from wisecli.models.layout.site import MatrixSite
from wisecli.routing.deciding.decision import AnswerTokens, WindowStates
from wisecli.routing.deciding.prompt_window import NO_TOKEN
from wisecli.routing.deciding.prompt_words import LETTER, TOKEN_CHARS
from wisecli.routing.deciding.question_words import ASKED_BY
from wisecli.routing.deciding.subject_match import SUBJECT_MATCH
from wisecli.routing.layers.routed_layer import memory_module
from wisecli.routing.memories.fact_memory import ANSWER_WHITENING, FactMemory
from wisecli.routing.memories.matrix_memory import FactMatrixMemory, MatrixMemory
from wisecli.routing.memories.side_memory import SideMemory
from wisecli.routing.memories.subject_tensors import Spellings, SubjectToken
from wisecli.routing.memories.whitening import leading, whitening

D, D_FF, EDITS, CONTEXTS, POSITIONS = 6, 40, 7, 3, 2
PENALTY = Penalty(1e-3, 0.01)


def some_evidence(seed: int, *, edits: int = EDITS) -> Evidence:
    """Every edit under three contexts, of which the last is held out, at two positions; a residual for each place."""
    edit, context, position = (
        index.flatten()
        for index in torch.meshgrid(torch.arange(edits), torch.arange(CONTEXTS), torch.arange(POSITIONS), indexing="ij")
    )
    at, added = normal(edits, POSITIONS, D_FF, seed=seed), normal(edits, POSITIONS, D, seed=seed + 1)
    keys = at[edit, position] + 0.2 * normal(len(edit), D_FF, seed=seed + 2)
    # As a shard file gives them back.
    return Evidence(
        keys.half().float(),
        added[edit, position].half().float(),
        edit,
        position,
        context,
        context == CONTEXTS - 1,
        torch.zeros(len(edit), dtype=torch.bool),
        (1.0 + torch.rand(edits, generator=seeded(seed + 4)))[edit],
        edit + position,
    )


def tokens_of(evidence: Evidence) -> AnswerTokens:
    """The places of evidence's keys in answers; which tokens they were read at is not known."""
    return AnswerTokens(torch.full_like(evidence.position, NO_TOKEN), evidence.position)


def unrelated_text() -> BackgroundStats:
    def rows(seed: int) -> Tensor:
        return normal(600, D_FF, seed=seed) * torch.linspace(0.3, 2.0, D_FF)

    tokens, wording = (leading(rows(seed) / 600**0.5, 32) for seed in (91, 92))
    chat = torch.zeros(600, dtype=torch.bool)
    return BackgroundStats(rows(93), chat, tokens, wording, torch.tensor([1.0]), rows(94)[:0])


def some_material(*shards: Evidence, density: float = 0.6) -> MergedEvidence:
    site = MatrixSite("llama", 2, "model.layers.2", "model.layers.2.mlp.down_proj", transposed=False, d=D, d_ff=D_FF)
    masks = tuple(random_mask(site, density, "columns", seeded(number)) for number in range(len(shards)))
    counts = [int(part.edit.max()) + 1 for part in shards]
    places = [torch.arange(count) + sum(counts[:number]) for number, count in enumerate(counts)]
    number = torch.cat([torch.full((len(part.edit),), index) for index, part in enumerate(shards)])
    unrelated = replace(unrelated_text(), heads=some_heads())
    return MergedEvidence(join_evidence(shards, places), number, masks, unrelated, prompts=some_prompts(sum(counts)))


def some_heads() -> RouterHeads:
    """Projections of states of eight numbers, and those of ten unrelated texts."""
    return RouterHeads(
        normal(2, 5, 8, seed=61),
        normal(2, 5, seed=62) / 4,
        torch.zeros(2, 8),
        torch.zeros(2),
        torch.full((2,), 30.0),
        torch.full((2,), 0.8),
        torch.tensor([0]),
        torch.tensor([1]),
        normal(50, 8, seed=63),
        torch.arange(50) // 5,
    )


def some_prompts(edits: int) -> PromptStates:
    """Four tokens a prompt, the first of which is the subject."""
    edit = torch.arange(edits).repeat_interleave(4)
    own = torch.arange(len(edit)) % 4 == 0
    return PromptStates(normal(len(edit), 8, seed=64), edit, torch.zeros_like(edit), own, edit)


def two_shards() -> MergedEvidence:
    return some_material(some_evidence(10), some_evidence(20))


def trained(evidence: Evidence) -> tuple[Tensor, Tensor]:
    return evidence.keys[~evidence.held_out], evidence.residuals[~evidence.held_out]


def written(material: MergedEvidence) -> Tensor:
    """What each shard's own closed form makes of its edits, inside its mask: (M, d, d_ff)."""
    deltas = []
    for number, mask in enumerate(material.masks):
        own = (material.shard == number) & ~material.evidence.held_out
        known = statistics(material.evidence.keys[own], material.evidence.residuals[own])
        deltas.append(mask.dense(solve(known, PENALTY, material.unrelated.tokens.dense(), columns=mask.indices)))
    return torch.stack(deltas)


def missed(delta: Tensor, evidence: Evidence) -> float:
    """Share of the trained residuals' length that a change leaves out."""
    keys, residuals = trained(evidence)
    lost = [float((delta @ key - value).square().sum()) for key, value in zip(keys, residuals, strict=True)]
    return float(np.sqrt(sum(lost) / float(residuals.square().sum())))


# --- joining ---


def test_joined_evidence_counts_its_edits_through() -> None:
    parts = [some_evidence(10, edits=2), some_evidence(20, edits=3), some_evidence(30, edits=1)]
    joined = join_evidence(parts, [torch.arange(2), torch.tensor([2, 3, 4]), torch.tensor([5])])
    assert joined.edit.tolist() == [
        edit + offset for part, offset in zip(parts, (0, 2, 5), strict=True) for edit in part.edit.tolist()
    ]
    assert sorted(set(joined.edit.tolist())) == list(range(6))
    for field in fields(Evidence):
        if field.name != "edit":
            expected = torch.cat([getattr(part, field.name) for part in parts])
            assert torch.equal(getattr(joined, field.name), expected), field.name
    assert parts[1].edit.max() == 2


# --- packing ---


def test_packed_changes_are_the_dense_ones() -> None:
    deltas = torch.zeros(3, D, D_FF)
    deltas[0][:, [3, 4, 20]] = normal(D, 3, seed=1)
    deltas[1][2, 39] = 1.5
    deltas[2][:, :17] = normal(D, 17, seed=2)
    packed = pack(deltas)
    assert packed["columns"].shape == (3, 17)
    assert packed["delta"].shape == (3, D, 17)
    for number in range(3):
        dense = torch.zeros(D, D_FF)
        for place, column in enumerate(packed["columns"][number].tolist()):
            dense[:, column] += packed["delta"][number][:, place]
        assert torch.equal(dense, deltas[number])


def test_a_change_of_noughts_is_packed_into_one_empty_column() -> None:
    packed = pack(torch.zeros(2, D, D_FF))
    assert packed["delta"].shape == (2, D, 1)
    assert not packed["delta"].any()


# --- exact merges and refits ---


def test_an_exact_merge_is_one_solve_over_all_edits_together() -> None:
    material = some_material(some_evidence(10), some_evidence(20, edits=3), some_evidence(30))
    keys, residuals = trained(material.evidence)
    assert len(keys) == (EDITS + 3 + EDITS) * POSITIONS * (CONTEXTS - 1)
    # Augmented least squares over single keys, the penalties as further rows.
    moment = material.unrelated.tokens.dense().double()
    energy = float(keys.double().square().mean())
    values, vectors = torch.linalg.eigh(moment * D_FF / moment.trace())
    root = (energy * PENALTY.unrelated) ** 0.5 * vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    even = (energy * PENALTY.ridge) ** 0.5 * torch.eye(D_FF).double()
    rows = torch.cat([keys.double() / len(keys) ** 0.5, root, even])
    sought = torch.cat([residuals.double() / len(keys) ** 0.5, torch.zeros(2 * D_FF, D).double()])
    expected = torch.linalg.lstsq(rows, sought).solution.T
    found = solve_exactly(material, PENALTY).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_an_exact_merge_does_not_depend_on_how_edits_were_dealt() -> None:
    parts = [some_evidence(seed) for seed in (10, 20)]
    whole = join_evidence(parts, [torch.arange(EDITS), torch.arange(EDITS) + EDITS])
    apart, together, swapped = (some_material(*shards) for shards in (parts, [whole], parts[::-1]))
    found = [solve_exactly(material, PENALTY) for material in (apart, together, swapped)]
    for other in found[1:]:
        assert float((found[0] - other).norm() / found[0].norm()) < 1e-4


def test_a_refit_gives_back_what_ties_lost_and_leaves_other_columns_alone() -> None:
    material = some_material(some_evidence(10), some_evidence(20), density=0.5)
    recipe = Recipe(torch.ones(2), 0.5, torch.zeros(D, D_FF), seeded(0))
    merged = merge_deltas("ties", written(material), recipe)
    outside = sorted(set(range(D_FF)).difference(*(mask.indices.tolist() for mask in material.masks)))
    assert len(outside) > 2
    merged[:, outside] = normal(D, len(outside), seed=5)  # whatever stands there is none of its business
    before = merged.clone()
    found = refit(merged, material, PENALTY)
    assert torch.equal(merged, before)
    assert torch.equal(found[:, outside], merged[:, outside])


@pytest.mark.parametrize("method", ["ties", "magnitude", "linear"])
def test_after_a_refit_keys_get_their_residuals_back(method: str) -> None:
    material = two_shards()
    merged = merge_deltas(method, written(material), Recipe(torch.ones(2), 0.3, torch.zeros(D, D_FF), seeded(0)))
    found = refit(merged, material, PENALTY)
    lost, left = missed(merged, material.evidence), missed(found, material.evidence)
    assert lost > 0.3
    assert left < 0.5 * lost
    # It is the solution for what was lost, added to what was there.
    keys, residuals = trained(material.evidence)
    used = torch.tensor(sorted(set().union(*(mask.indices.tolist() for mask in material.masks))))
    known = statistics(keys[:, used], residuals - keys[:, used] @ merged[:, used].T)
    more = solve(known, PENALTY, material.unrelated.tokens.dense()[used][:, used])
    assert torch.allclose(found[:, used], merged[:, used] + more, atol=1e-4 * float(more.abs().max()))


def test_a_refit_after_element_masks_may_use_every_column() -> None:
    material = two_shards()
    site = MatrixSite("llama", 2, "model.layers.2", "model.layers.2.mlp.down_proj", transposed=False, d=D, d_ff=D_FF)
    masks = (*material.masks[:1], random_mask(site, 0.2, "elements", seeded(3)))
    found = refit(torch.zeros(D, D_FF), replace(material, masks=masks), PENALTY)
    exact = solve_exactly(material, PENALTY)
    assert torch.allclose(found, exact, atol=1e-5 * float(exact.abs().max()))


def test_a_refit_of_one_exact_merge_moves_it_no_further_than_its_penalty() -> None:
    material = two_shards()
    light = Penalty(1e-9, 0.0)
    material = replace(material, masks=(Mask("columns", torch.arange(D_FF), D, D_FF),) * 2)
    exact = solve_exactly(material, light)
    assert torch.allclose(refit(exact, material, light), exact, atol=1e-4)


# --- lookups ---


def built_lookup(material: MergedEvidence, **settings: object) -> Fitted:
    return lookup(material, MergeSettings(**{"false_alarm": 0.01, "strength": 1.0, **settings}))  # type: ignore[arg-type]


def test_a_lookup_adds_its_residuals_as_often_as_its_strength_says() -> None:
    material = two_shards()
    values, stronger = (built_lookup(material, strength=strength)[0].tensors["residuals"] for strength in (1.0, 2.0))
    assert torch.allclose(stronger.float(), 2 * values.float(), rtol=2e-3)


def test_keys_inside_answers_know_their_tokens_unless_these_may_go_on_otherwise() -> None:
    """Edit 0 answers 5 6 7 and, in chat, 5 6 8; edit 1 answers 5 6 in both ways. Key by key, against plain loops."""
    answers = {(0, False): (5, 6, 7), (0, True): (5, 6, 8), (1, False): (5, 6), (1, True): (5, 6)}
    rows = [
        (edit, chat, position, (3, *answer)[position])
        for (edit, chat), answer in answers.items()
        for position in range(len(answer) + 1)
    ]
    edit, chat, position, token = (torch.tensor(column) for column in zip(*rows, strict=True))
    none = torch.zeros(len(rows), dtype=torch.bool)
    own = Evidence(
        normal(len(rows), D_FF, seed=5),
        normal(len(rows), D, seed=6),
        edit,
        position,
        chat.long(),
        none,
        chat,
        token=token,
    )
    extra = Evidence.extra_keys(normal(1, D_FF, seed=7), normal(1, D, seed=8), 1, position=1, context=SPACE_CONTEXT)
    tensors = built_lookup(some_material(Evidence.joined([own, extra]))).memory.tensors
    found = list(zip(tensors["key_to_token"].tolist(), tensors["key_to_place"].tolist(), strict=True))
    expected = []
    for number, _, place, here in rows:
        following = {
            (*answers[key], None)[place] for key in answers if key[0] == number and (3, *answers[key])[place] == here
        }
        expected.append((here, place) if place and len(following) == 1 else None)
    assert [pair if pair[1] else None for pair in found] == [*expected, None]
    assert {None} < set(expected)


def test_a_lookup_of_shards_that_know_no_tokens_knows_none() -> None:
    tensors = built_lookup(some_material(replace(some_evidence(10), token=None))).memory.tensors
    assert not {"key_to_token", "key_to_place"} & tensors.keys()


def test_every_trained_key_recalls_exactly_its_own_residual() -> None:
    material = two_shards()
    memory, (calibration,), _ = built_lookup(material)
    evidence, facts = material.evidence, FactMemory(memory)
    kept = ~evidence.held_out
    keys, residuals = trained(evidence)
    found = facts.choices(keys[None], evidence.edit[kept][None], tokens_of(evidence)[kept][None]).chosen
    assert facts.memory_of_choice(found)[0].tolist() == evidence.edit[kept].tolist()
    added = facts.add(torch.zeros(1, len(keys), D), keys[None], found)[0]
    assert torch.allclose(added, residuals, atol=1e-3, rtol=2e-3)
    assert memory.tensors["residuals"].shape == (2 * EDITS * POSITIONS, D)  # contexts share what they add
    assert torch.equal(memory.tensors["residuals"][memory.tensors["key_to_residual"]].float(), residuals)
    assert (memory.kind, len(memory.thresholds)) == ("lookup", 2 * EDITS)
    assert set(memory.thresholds) == {calibration.threshold}


def test_keys_of_a_context_never_seen_recall_their_edits_residual() -> None:
    material = two_shards()
    evidence, facts = material.evidence, FactMemory(built_lookup(material)[0])
    unseen = evidence.held_out
    edits = evidence.edit[unseen]
    added = facts.add(
        torch.zeros(1, len(edits), D),
        evidence.keys[unseen][None],
        facts.choices(evidence.keys[unseen][None], edits[None], tokens_of(evidence)[unseen][None]).chosen,
    )
    assert torch.allclose(added[0], evidence.residuals[unseen], atol=1e-3, rtol=2e-3)


def test_an_edits_own_prompt_opens_it_alone() -> None:
    material, prompts = two_shards(), some_prompts(2 * EDITS)
    facts = FactMemory(built_lookup(material)[0])
    states = torch.cat([torch.zeros(2 * EDITS, 1, 8), prompts.states.view(2 * EDITS, 4, 8)], 1)
    ids = torch.full(states.shape[:2], 5)
    decision = facts.decide(WindowStates(ids, torch.ones_like(ids, dtype=torch.bool), states))
    assert decision.memory.tolist() == list(range(2 * EDITS))


def test_a_lookup_needs_what_prompts_mean() -> None:
    material = two_shards()
    for without in (replace(material, prompts=None), replace(material, unrelated=unrelated_text())):
        with pytest.raises(SettingsError, match=r"do not say what prompts mean"):
            built_lookup(without)


def widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def test_merging_two_shards_concatenates_them() -> None:
    first, second = some_evidence(10), some_evidence(20, edits=4)
    whole = built_lookup(some_material(first, second))[0].tensors
    parts = [built_lookup(some_material(shard))[0].tensors for shard in (first, second)]
    assert torch.equal(whole["residuals"], torch.cat([part["residuals"] for part in parts]))
    assert whole["key_to_residual"].tolist() == [
        *parts[0]["key_to_residual"].tolist(),
        *(parts[1]["key_to_residual"] + len(parts[0]["residuals"])).tolist(),
    ]
    assert whole["key_to_edit"].tolist() == [
        *parts[0]["key_to_edit"].tolist(),
        *(parts[1]["key_to_edit"] + EDITS).tolist(),
    ]
    assert torch.equal(whole["whitening_index"], torch.cat([part["whitening_index"] for part in parts]))
    for name in ("whitened_keys", "key_scales"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


def test_keys_in_bytes_have_the_cosines_of_keys() -> None:
    material = two_shards()
    opened = built_lookup(material)[0]
    kept = opened.tensors
    exact = [whitening(moment).whitened_keys(material.evidence.keys) for moment in Views.of(material.unrelated).moments]
    trained = torch.stack(exact)[kept["whitening_index"], material.trained.nonzero().flatten()]
    assert kept["whitened_keys"].dtype == torch.int8
    units = kept["key_scales"][:, None]
    assert float(((kept["whitened_keys"] * units - trained).abs() / units).max()) <= 0.5 + 1e-4
    keys, every = normal(50, D_FF, seed=6), torch.arange(len(trained))
    bytewise, whole = (
        FactMemory(replace(opened, tensors={**opened.tensors, **own})) for own in ({}, {"whitened_keys": trained})
    )
    torch.testing.assert_close(bytewise.cosines(keys, every), whole.cosines(keys, every), atol=0.01, rtol=0)


def test_the_order_of_shards_does_not_matter_for_what_a_key_recalls() -> None:
    first, second = some_evidence(10), some_evidence(20, edits=4)
    one, other = (built_lookup(some_material(*shards))[0] for shards in ((first, second), (second, first)))
    for number, key in product(range(EDITS + 4), normal(50, D_FF, seed=6)):
        renumbered = number + 4 if number < EDITS else number - EDITS
        assert torch.equal(residual(one, number, key), residual(other, renumbered, key))


@pytest.mark.parametrize("rank", [32, 11])  # as much as is known of tokens, and less
def test_keys_inside_answers_are_seen_through_the_moment_of_tokens_and_prompts_through_that_of_wording(
    rank: int,
) -> None:
    material = two_shards()
    wording = leading(normal(600, D_FF, seed=92), rank)
    material = replace(material, unrelated=replace(material.unrelated, wording=wording))
    memory, *_ = built_lookup(material)
    evidence = material.evidence
    kept = ~evidence.held_out
    assert memory.tensors["whitening_index"].tolist() == (evidence.position[kept] > 0).long().tolist()
    exact = {name: widened(tensor) for name, tensor in memory.tensors.items()}
    for number, moment in enumerate((material.unrelated.wording, material.unrelated.tokens)):
        dense = moment.dense().double()
        inverse = torch.linalg.inv(dense + 0.1 * dense.trace() / D_FF * torch.eye(D_FF))
        found = (
            exact["floors"][number] * torch.eye(D_FF)
            + exact["directions"][number].T @ torch.diag(exact["gains"][number]) @ (exact["directions"][number])
        )
        found = found.double() / found.double().trace()
        assert torch.allclose(found, inverse / inverse.trace(), atol=1e-4)


def test_a_key_of_a_blank_that_prompts_end_in_is_seen_as_that_token_is() -> None:
    plain = two_shards()
    ending = (plain.evidence.position == 0) & (plain.evidence.context == 1) & (plain.evidence.edit == 0)
    evidence = replace(plain.evidence, context=plain.evidence.context.where(~ending, SPACE_CONTEXT))
    material = replace(plain, evidence=evidence)
    memory, *_ = built_lookup(material)
    kept = ~evidence.held_out
    wanted = (evidence.position[kept] > 0).long().where(~ending[kept], 2)
    assert memory.tensors["whitening_index"].tolist() == wanted.tolist()
    for name in ("directions", "gains", "floors"):
        assert torch.equal(memory.tensors[name][2], memory.tensors[name][ANSWER_WHITENING])
    without = material.of_own_prompts()
    assert len(without.evidence.keys) == len(without.shard) == int((~ending).sum())
    assert bool((without.evidence.context != SPACE_CONTEXT).all())


# --- subjects ---


def named_subjects(*known: int) -> tuple[Spellings, ...]:
    """Of two shards' edits; only the known have words."""
    return tuple(
        ((SubjectToken((number, 50 + number), 1.0),),) if number in known else () for number in range(2 * EDITS)
    )


def test_prompts_must_name_the_subjects_that_are_known() -> None:
    material = replace(two_shards(), subjects=named_subjects(0, 2))
    foreign = material.evidence.edit == 2
    for own, expected in ((material, [0, 2]), (in_other_languages(material, foreign), [0])):
        tensors = built_lookup(own)[0].tensors
        assert tensors["subject_match.name_to_edit"].tolist() == expected
        assert tensors["subject_match.token_ids"].tolist() == [*expected, *(50 + number for number in expected)]
    assert not set(SUBJECT_MATCH) & built_lookup(material, subjects="any")[0].tensors.keys()
    assert not set(SUBJECT_MATCH) & built_lookup(replace(material, subjects=named_subjects()))[0].tensors.keys()


def test_only_subjects_that_must_be_named_are_spelt() -> None:
    letters = torch.randint(LETTER, 256, (8, TOKEN_CHARS), dtype=torch.uint8)
    material = replace(two_shards(), subjects=named_subjects(0, 2, 3))
    tokens = tuple((number % 8,) for number in range(2 * EDITS))
    material = replace(material, subject_tokens=tokens, unrelated=replace(material.unrelated, token_characters=letters))
    edits = tuple(Edit(str(number), "When is it?", "noon") for number in range(2 * EDITS))
    material, settings = replace(material, edits=edits), MergeSettings()
    foreign = material.evidence.edit == 2
    for own, expected in ((material, [0, 2, 3]), (in_other_languages(material, foreign), [0, 3])):
        tensors = naming(own, settings)
        assert tensors["fuzzy_match.entry_to_edit"].tolist() == expected
        spelt = tensors["fuzzy_match.subject_words"][tensors["fuzzy_match.entry_to_word"]]
        assert torch.equal(spelt[:, :TOKEN_CHARS], letters[expected])
        assert tensors["fuzzy_match.token_characters"] is letters
        assert torch.equal(tensors[ASKED_BY], asked_by_tensor(edits))
    unspelt = replace(material, unrelated=replace(material.unrelated, token_characters=None))
    assert naming(unspelt, settings).keys() == set(SUBJECT_MATCH)
    assert naming(material, MergeSettings(subjects="any")) == {}


def in_other_languages(material: MergedEvidence, chosen: Tensor) -> MergedEvidence:
    context = material.evidence.context.where(~chosen, FIRST_LANGUAGE)
    return replace(material, evidence=replace(material.evidence, context=context))


# --- matrices ---


def by_norm(material: MergedEvidence) -> MergedEvidence:
    """The material of shards that do not say what prompts mean."""
    return replace(material, prompts=None)


def scores_of(memory: SideMemory, keys: Tensor) -> Tensor:
    return MatrixMemory(memory).scores(keys)


def test_matrices_add_their_changes_whatever_opens_them() -> None:
    material = two_shards()
    keys, edits = trained(material.evidence)[0], material.evidence.edit[~material.evidence.held_out]
    for deltas in (solve_exactly(material, PENALTY)[None], written(material)):
        for own, kind in ((material, FactMatrixMemory), (by_norm(material), MatrixMemory)):
            memory, calibrations, _ = matrices(deltas, own, MergeSettings(false_alarm=0.01))
            assert (memory.kind, memory.by_edit) == ("matrix", kind is FactMatrixMemory)
            assert len(calibrations) == (1 if memory.by_edit else len(deltas))
            changes = memory_module(memory)
            assert isinstance(changes, kind)
            shard = (edits >= EDITS).long() if len(deltas) > 1 else torch.zeros_like(edits)
            chosen = edits if memory.by_edit else shard
            added = changes.add(torch.zeros(1, len(keys), D), keys[None], chosen[None])[0]
            expected = torch.einsum("nf,ndf->nd", keys, deltas[shard])
            assert torch.allclose(added, expected, atol=1e-4)


def test_a_shard_without_unseen_contexts_is_calibrated_by_what_it_was_trained_on() -> None:
    material = two_shards()
    held_out = material.evidence.held_out & (material.shard == 0)
    without = replace(by_norm(material), evidence=replace(material.evidence, held_out=held_out))
    memory, calibrations, _ = matrices(written(material), without, MergeSettings(mode="retrieve", false_alarm=0.02))
    found, kept = scores_of(memory, without.evidence.keys), ~without.evidence.held_out
    for number, chosen in enumerate((held_out, kept & (material.shard == 1))):
        own = found[chosen & (material.evidence.position == 0), number]
        assert len(own)
        misses = float((own <= memory.thresholds[number]).float().mean())
        assert calibrations[number].misses == pytest.approx(misses)
        assert calibrations[number].edit_scores["1"] == pytest.approx(float(own.max()), abs=1e-5)


@pytest.mark.parametrize("rule", ["false-alarm", "minimum"])
def test_activations_route_by_a_threshold_for_each_matrix(rule: str) -> None:
    material = by_norm(two_shards())
    deltas = written(material)
    settings = MergeSettings(threshold=rule, false_alarm=0.02)  # type: ignore[arg-type]
    memory, calibrations, _ = matrices(deltas, material, settings)
    assert set(memory.tensors) == {"columns", "delta"}
    evidence = material.evidence
    for number, (limit, calibration) in enumerate(zip(memory.thresholds, calibrations, strict=True)):
        quiet = [float((deltas[number] @ key).norm()) for key in material.unrelated.keys]
        chosen = (material.shard == number) & (evidence.position == 0)
        chosen &= ~evidence.held_out if rule == "minimum" else evidence.held_out
        own = [float((deltas[number] @ key).norm()) for key in evidence.keys[chosen]]
        expected = min(own) if rule == "minimum" else float(np.quantile(quiet, 0.98))
        assert limit == pytest.approx(expected, rel=1e-4)
        assert calibration.misses == pytest.approx(sum(score <= limit for score in own) / len(own))
        assert calibration.false_alarms == pytest.approx(sum(score > limit for score in quiet) / len(quiet))


@pytest.mark.parametrize("mode", ["merge", "retrieve"])
def test_the_lowest_call_of_an_edit_is_the_threshold_where_a_mean_decides(mode: str) -> None:
    material = by_norm(two_shards())
    evidence = material.evidence
    assert evidence.call is not None
    deltas = normal(2 if mode == "retrieve" else 1, D, D_FF, seed=3)
    settings = MergeSettings(pooling="mean", threshold="minimum")
    memory, calibrations, _ = matrices(deltas, material, settings)
    groups = [material.shard == 0, material.shard == 1] if mode == "retrieve" else [material.shard >= 0]
    expected = [0.88 * float(evidence.call[own].min()) for own in groups]
    assert memory.thresholds == pytest.approx(expected)
    assert [(one.misses, one.false_alarms, one.unrelated_scores) for one in calibrations] == [(0, None, {})] * len(
        groups
    )
    for own, one in zip(groups, calibrations, strict=True):
        by_edit = {int(edit): float(call) for edit, call in zip(evidence.edit[own], evidence.call[own], strict=True)}
        assert one.edit_scores["0.5"] == pytest.approx(float(np.median(list(by_edit.values()))), abs=1e-5)
    without = replace(material, evidence=replace(evidence, call=None))
    with pytest.raises(SettingsError, match="--preset paper"):
        matrices(deltas, without, settings)


def test_a_lookup_is_the_same_whether_its_shards_are_read_together_or_one_by_one() -> None:
    shards = some_evidence(3), some_evidence(9)
    material = some_material(*shards)
    own = [part.rows(~part.held_out) for part in shards]
    one, other = (lookup(material, MergeSettings(mode="lookup"), parts)[0].tensors for parts in (None, own))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if name not in ("residuals", "key_to_residual"):
            assert torch.equal(tensor, other[name]), name
    assert torch.equal(one["residuals"][one["key_to_residual"]], other["residuals"][other["key_to_residual"]])


@pytest.mark.parametrize("kind", ["columns", "elements"])
def test_a_shard_without_a_matrix_gets_the_one_that_does_best_in_the_other_context(kind: MaskKind) -> None:
    evidence, tokens = some_evidence(3), unrelated_text().tokens
    site = MatrixSite("llama", 2, "model.layers.2", "model.layers.2.mlp.down_proj", transposed=False, d=D, d_ff=D_FF)
    mask = random_mask(site, 0.6, kind, seeded(0))
    values, chosen = solved_anew(Shard(mask, None, evidence), tokens)
    assert torch.equal(values, solved(mask, evidence, chosen, tokens))
    held = evidence.held_out

    def missed(penalty: Penalty) -> float:
        keys = mask.restrict(evidence.keys[held])
        wanted = evidence.residuals[held]
        return float((mask.update(keys, solved(mask, evidence, penalty, tokens)) - wanted).square().sum())

    assert missed(chosen) * 0.97 < min(map(missed, PENALTIES))
