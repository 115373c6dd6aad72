from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.byte_level import save_base
from support.loading import CPU

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.shard import JUDGED_FORM, PromptStates
from wisecli.editing.router_training.router_heads import router_heads
from wisecli.editing.router_training.token_states import prompt_states, read_sites
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.memory.fitting import request_gate_fitting
from wisecli.memory.fitting.late_interaction_fitting import (
    OTHER_LANGUAGES,
    FittedLateInteraction,
    fit_late_interaction,
)
from wisecli.memory.fitting.request_gate_fitting import request_gate_tensors
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.progress import ignore_progress
from wisecli.routing.gating.gates import DEEP_SHARE
from wisecli.routing.gating.request_gate import DEEP_LOGIT_OFFSET, LOGIT_OFFSET


def test_prompts_are_read_again_from_the_last_part_that_was_not_full() -> None:
    each = request_gate_fitting._AT_A_TIME
    one_form = torch.arange(3 * each)
    for known, begun in ((0, 0), (each - 1, 0), (each, each), (2 * each + 5, 2 * each)):
        assert request_gate_fitting._begun(one_form, known) == (begun, begun)
    three_forms = one_form // 3
    first = int(three_forms[2 * each])
    assert int(three_forms[2 * each - 1]) == first  # an edit's forms are read in two parts
    assert request_gate_fitting._begun(three_forms, first + 9) == (each, first)
    assert request_gate_fitting._begun(one_form[:each], each) == (each, each)


EDITS = [
    Edit(id=str(number), prompt=f"Who {verb} the {name}?", target="Ann", subject=name)
    for number, (verb, name) in enumerate((("built", "Tern"), ("owns", "Gull"), ("sold", "Rook"), ("saw", "Crow")))
]


class Fitted(NamedTuple):
    """Heads, the states of prompts, and late interaction fitted to them."""

    heads: RouterHeads
    prompts: PromptStates
    late_interaction: FittedLateInteraction


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Of a tiny model with a chat template, whose gates take every prompt for a mention."""
    base = save_base(tmp_path_factory.mktemp("gates") / "base")
    loaded = load_model(base, CPU)
    sites = read_sites(loaded, find_site(base, Checkpoint(base), 2))
    heads = router_heads(
        loaded, sites, BaseIdentity("gates", "gates"), texts=24, batch_size=16, on_progress=ignore_progress
    )
    for name in ("request_gate.out", "deep_gate.out"):
        if name in heads.request_gate:
            out = heads.request_gate[name].clone()
            out[0, -1] -= 20
            heads = replace(heads, request_gate={**heads.request_gate, name: out})
    numbered = list(enumerate(EDITS))
    prompts = prompt_states(loaded, sites, numbered, batch_size=4, on_progress=ignore_progress, stage="")
    return Fitted(heads, prompts, fit_late_interaction(heads, prompts.compared, len(EDITS)))


def test_an_edits_bar_is_below_its_prompt_in_chat_too(fitted: Fitted) -> None:
    heads, prompts, late_interaction = fitted
    judged = prompts.judged
    assert judged.compared.edit.unique().tolist() == [0, 1, 2, 3]
    assert len(judged.gated.compared.edit) == len(judged.compared.edit)
    assert int(prompts.compared.form.max()) < OTHER_LANGUAGES  # nothing is compared with them
    sure = replace(late_interaction, own_probs=torch.ones_like(late_interaction.own_probs))
    both, bare, chat = (
        request_gate_tensors(heads, some, sure) for some in (prompts, prompts.rows(prompts.form < JUDGED_FORM), judged)
    )
    for name in {LOGIT_OFFSET, DEEP_LOGIT_OFFSET} & both.keys():
        spared = 0.25 / DEEP_SHARE if name == DEEP_LOGIT_OFFSET else 0.0  # in chat less is spared
        assert torch.allclose(both[name], bare[name].minimum(chat[name] + spared), atol=1e-4)
        assert not torch.equal(bare[name], chat[name])


def test_offsets_of_former_edits_stay_to_the_last_bit(fitted: Fitted) -> None:
    heads, prompts, late_interaction = fitted
    whole = request_gate_tensors(heads, prompts, late_interaction)
    former = {name: whole[name][:3] for name in (LOGIT_OFFSET, DEEP_LOGIT_OFFSET) if name in whole}
    again = request_gate_tensors(heads, prompts, late_interaction, former)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_all_kinds_of_prompts_are_read_from_the_same_edit_on(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_gate_fitting, "_AT_A_TIME", 2)
    prompts = fitted.prompts
    late_interaction = fitted.late_interaction.late_interaction
    some = prompts.judged.rows(prompts.judged.edit != 0)
    for asked, begins in (([prompts, prompts.judged], [0, 0, 2, 2, 4]), ([prompts, some], [0, 0, 0, 0, 0])):
        for known, begin in enumerate(begins):
            own = request_gate_fitting._own_requests(asked, 1, late_interaction, known)
            assert {one.known for one in own} == {begin}
