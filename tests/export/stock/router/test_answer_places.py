from dataclasses import replace

import pytest
import torch
from support.drawing import normal
from torch import Tensor

from wisecli.export.stock.edit_states import EditStates, Next
from wisecli.export.stock.router.answer_places import (
    AnswerPlaces,
    Elsewhere,
    answer_places,
    begun_answers,
    prompts_ends,
)

SIZE, WAYS = 24, 6
# Of each place the edit, and whether it is inside the answer. The third edit may begin in two ways.
EDIT = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
INSIDE = torch.tensor([False, True, True, False, True, False, False, True, False])
SPACED = torch.ones(9, dtype=torch.bool).index_fill(0, torch.tensor(6), False)
ALONE = 8


# States inside no answer, and no sinks.
ELSEWHERE = Elsewhere(0.5 * normal(100, SIZE, seed=9), torch.empty(0, SIZE))
ADDED = normal(len(EDIT), SIZE, seed=3)


@pytest.fixture(scope="module")
def states() -> EditStates:
    points = 1.5 * normal(len(EDIT), SIZE, seed=1)
    found = (points[:, None] + 0.2 * normal(len(EDIT), WAYS, SIZE, seed=2)).flatten(0, 1)
    key = torch.arange(len(EDIT)).repeat_interleave(WAYS)
    # The other beginning of the third edit is the rarer one.
    kept = torch.ones(len(key), dtype=torch.bool).index_fill(0, (key == 6).nonzero()[3:, 0], False)
    asking = 0.5 * normal(40, SIZE, seed=6), torch.arange(40) % 4
    return EditStates(found[kept], key[kept], EDIT, INSIDE, SPACED, then(len(EDIT)), *asking)


@pytest.fixture(scope="module")
def places(states: EditStates) -> AnswerPlaces:
    return found_in(states, 5, ELSEWHERE, ADDED)


def then(places: int) -> tuple[Next, ...]:
    return tuple(Next(token, None) for token in range(places))


def found_in(states: EditStates, edits: int, elsewhere: Elsewhere, added: Tensor) -> AnswerPlaces:
    return answer_places(states, elsewhere, added, edits)


def readings(places: AnswerPlaces, states: Tensor) -> Tensor:
    return states @ places.directions.T + places.offsets


def test_of_an_edits_places_the_right_one_reads_most(places: AnswerPlaces, states: EditStates) -> None:
    read = readings(places, states.states)
    own_edit = states.edits[states.key][:, None] == places.edit
    right = torch.arange(len(EDIT)) == states.key[:, None]
    assert (read[right] > 0.5).all()
    assert (read[own_edit & ~right] < 0.5).all()


def test_states_nearby_are_at_the_same_place(places: AnswerPlaces, states: EditStates) -> None:
    means = torch.stack([states.states[states.key == number].mean(0) for number in range(len(EDIT))])
    near = (means[:, None] + 0.2 * normal(len(EDIT), 40, SIZE, seed=4)).flatten(0, 1)
    key = torch.arange(len(EDIT)).repeat_interleave(40)
    own_edit = EDIT[key][:, None] == places.edit
    agrees = (readings(places, near) > 0.5) == (torch.arange(len(EDIT)) == key[:, None])
    assert agrees[own_edit].float().mean() > 0.95


def test_a_first_place_closes_at_all_others_and_an_only_one_never(places: AnswerPlaces, states: EditStates) -> None:
    first = torch.tensor([0, 3, 5])
    for place in first.tolist():
        edit = int(EDIT[place])
        at = states.states[(states.edits[states.key] == edit) & (states.key != place)]
        assert (readings(places, at)[:, place] < 0.5).all()
    assert not places.directions[ALONE].any()
    assert places.offsets[ALONE] == 1
    assert not begun_answers(states, 5, ELSEWHERE)[3:].any()


def test_inside_of_an_answer_some_of_it_was_said(states: EditStates) -> None:
    begun = begun_answers(states, 5, ELSEWHERE)
    for edit in range(3):
        own = states.edits[states.key] == edit
        read, said = states.states[own] @ begun[edit, :-1] + begun[edit, -1], INSIDE[states.key[own]]
        assert (read[said] > 0.5).all()
        # Not where it begins, be it the rarer way.
        assert (read[~said] < 0.5).all()
        assert (~said).sum() > WAYS - 1


def test_inside_reads_about_nothing_where_nothing_was_said_however_far_from_the_answer() -> None:
    # Answers' own states are far from all others, which a plane that is only bounded from above reads far below 0.
    axis = torch.nn.functional.one_hot(torch.tensor(0), SIZE)
    others, prompts = (0.3 * normal(1500, SIZE, seed=seed) + axis for seed in (30, 31))
    begun, said = (0.2 * normal(4, SIZE, seed=seed) + side * axis for seed, side in ((32, 1), (33, -1)))
    states = EditStates(
        torch.cat([begun, said]),
        torch.arange(2).repeat_interleave(4),
        torch.zeros(2, dtype=torch.long),
        torch.tensor([False, True]),
        torch.tensor([True, True]),
        then(2),
        prompts,
        torch.zeros(len(prompts), dtype=torch.long),
    )
    inside = begun_answers(states, 1, Elsewhere(others, ELSEWHERE.sinks))[0]
    read = torch.cat([others, prompts, begun]) @ inside[:-1] + inside[-1]
    assert read.mean().abs() < 0.1
    assert read.std() < 0.2
    assert (said @ inside[:-1] + inside[-1]).min() > read.max() + 0.1


def test_one_plane_tells_where_any_answer_begins_also_behind_unseen_prompts() -> None:
    # Prompts end in one direction, whatever edit they are of; answers' insides and all other tokens lie in others.
    axis = 2.0 * torch.nn.functional.one_hot(torch.tensor(0), SIZE)
    ends, unseen = (axis + 0.4 * normal(60, SIZE, seed=seed) for seed in (40, 41))
    inside, sinks = 0.6 * normal(60, SIZE, seed=42), 20 * axis - 40 * axis.roll(3) + 0.1 * normal(10, SIZE, seed=43)
    key = torch.arange(2).repeat_interleave(60)
    states = EditStates(
        torch.cat([ends, inside]),
        key,
        torch.zeros(2, dtype=torch.long),
        torch.tensor([False, True]),
        torch.tensor([True, True]),
        then(2),
        0.5 * normal(20, SIZE, seed=44),
        torch.zeros(20, dtype=torch.long),
    )
    plane = prompts_ends(states, Elsewhere(ELSEWHERE.others, sinks))
    read = [some @ plane[:-1] + plane[-1] for some in (unseen, inside, ELSEWHERE.others, sinks)]
    assert read[0].mean() > 0.7
    assert max(float(some.mean()) for some in read[2:]) < 0.25
    assert read[0].quantile(0.05) > read[2].quantile(0.95)


def test_each_place_adds_what_is_given_for_it(places: AnswerPlaces) -> None:
    assert torch.equal(places.added, ADDED)
    assert torch.equal(places.edit, EDIT)


def test_the_order_of_states_does_not_matter(places: AnswerPlaces, states: EditStates) -> None:
    order = torch.randperm(len(states.key), generator=torch.Generator().manual_seed(5))
    again = found_in(replace(states, states=states.states[order], key=states.key[order]), 5, ELSEWHERE, ADDED)
    # To within what the solver leaves.
    torch.testing.assert_close(readings(again, states.states), readings(places, states.states), rtol=1e-2, atol=1e-2)


def test_nothing_is_added_at_sinks(states: EditStates, places: AnswerPlaces) -> None:
    sinks = 40 * torch.nn.functional.one_hot(torch.tensor(3), SIZE) + 0.1 * normal(20, SIZE, seed=10)
    shut = found_in(states, 5, Elsewhere(ELSEWHERE.others, sinks), ADDED)
    assert (readings(places, sinks) > 0.5).any()
    assert (readings(shut, sinks) < 0.5).all()
    torch.testing.assert_close(readings(shut, states.states), readings(places, states.states), rtol=0.0, atol=0.4)


def test_how_an_answer_begins_is_told_by_what_all_edits_prompts_end_in() -> None:
    edits, ways = 12, 4
    ends = normal(2, SIZE, seed=20)
    # Each edit begins at both ends of prompts and then says a token; its own states differ by much at each.
    points = torch.stack([*ends, normal(SIZE, seed=21)])[None] + 0.5 * normal(edits, 3, SIZE, seed=22)
    found = (points[:, :, None] + 0.2 * normal(edits, 3, ways, SIZE, seed=23)).flatten(0, 2)
    key = torch.arange(3 * edits).repeat_interleave(ways)
    edit, spaced, inside = torch.arange(edits).repeat_interleave(3), *(torch.arange(3 * edits) % 3 == n for n in (0, 2))
    asking = 0.5 * normal(40, SIZE, seed=24), torch.arange(40) % edits
    states = EditStates(found, key, edit, inside, spaced | inside, then(3 * edits), *asking)
    places = found_in(states, edits, ELSEWHERE, normal(3 * edits, SIZE, seed=25))
    others = torch.arange(1, 3 * edits, 3)
    assert torch.equal(places.directions[others], places.directions[others[:1]].expand(edits, -1))
    # As well at ends that none of an edit's own prompts has.
    unseen = ends[:, None] + 0.7 * normal(2, 200, SIZE, seed=26)
    for end, states_there in enumerate(unseen):
        read = readings(places, states_there).unflatten(1, (edits, 3)) > 0.5
        assert (read[..., end] & ~read[..., 1 - end]).float().mean() > 0.9
