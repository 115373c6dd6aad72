"""What a base model's request gate is learned from, and that it is learned."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU

from wisecli.artifacts.tensor_schema import REQUEST as ROWS
from wisecli.artifacts.tensor_schema import require_layout
from wisecli.data.corpus import requests
from wisecli.editing.request_learning import Projections, _examples, _facts, learn_request_gate
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.loading import Loaded, load_model
from wisecli.models.site import find_site
from wisecli.progress import ignore
from wisecli.routing.request_gate import REQUEST


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(save_tiny(tmp_path_factory.mktemp("base") / "base"), load=CPU)


def test_every_fact_is_asked_and_mentioned(loaded: Loaded) -> None:
    chance = random.Random(0)
    for number, fact in enumerate(_facts(20, chance)):
        examples = list(_examples(loaded, number, fact, chance))
        asked = [one for one in examples if one.asks]
        assert 5 < len(asked) < len(examples) - 5
        assert {one.fact for one in examples} == {number}
        assert fact.subject in fact.questions[0]


def test_the_gate_is_learned_the_same_each_time(loaded: Loaded, tmp_path: Path) -> None:
    base = Path(loaded.model.config._name_or_path)
    site = find_site(base, Checkpoint(base), 2).below(0)
    chance = torch.Generator().manual_seed(1)
    projections = Projections(torch.randn(2, 8, site.d, generator=chance), torch.zeros(2, 8))
    learned = [learn_request_gate(loaded, site, projections, share=0.02, batch_size=8, watch=ignore) for _ in range(2)]
    assert tuple(learned[0]) == REQUEST
    require_layout(tmp_path, learned[0], ROWS, {})
    for name in REQUEST:
        assert torch.equal(learned[0][name], learned[1][name])
        assert learned[0][name].isfinite().all()


def test_tasks_and_times_hold_the_question() -> None:
    known, chance, question = requests(), random.Random(2), "Who runs the Tern database?"
    for _ in range(200):
        assert question in known.task(question, chance)
        timed = known.timed(question, chance)
        assert timed != question
        assert "runs the Tern database" in timed
        assert "{" not in timed
    for pattern in (*known.asked, *known.mentioned):
        text = known.filled(pattern, question, "Tern", "Gull")
        assert "tern" in text.casefold()
        assert not any(f"{{{slot}}}" in text for slot in ("question", "inner", "stem", "subject", "other", "capitals"))
