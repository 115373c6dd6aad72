from dataclasses import replace

import torch
from support.fitting import EDITS, bench_of

from wisecli.artifacts.shard import SEPARATOR_CONTEXT, Evidence
from wisecli.memory.merging.pair_tensors import PairTensors


def test_answers_begin_and_end_where_the_training_examples_do() -> None:
    """Five edits in a shard, numbered 3 to 7 among all; each residual is its own key's."""
    evidence, first = bench_of("llama").evidence, 3
    pairs = PairTensors(9, first + len(EDITS))
    residual = torch.arange(len(evidence.edit)) + 100
    pairs.add_answers(evidence, evidence.edit.long() + first, residual)
    pairs.add_separators(torch.tensor([3, 5]), torch.tensor([50, 50]))
    found = pairs.tensors(300)
    assert found["pairs.separator_token_id"].tolist() == [9]
    assert found["pairs.usable"].tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    assert found["pairs.separators"][[3, 5]].tolist() == [50, 50]
    ends = set(found["pairs.ends"].nonzero().flatten().tolist())
    for edit in range(len(EDITS)):
        rows = [row for row in range(len(residual)) if int(evidence.edit[row]) == edit]
        places = {row: int(evidence.position[row]) for row in rows}
        bare = [row for row in rows if places[row] == 0 and int(evidence.context[row]) == 0]
        assert found["pairs.begins"][edit + first] == residual[bare[0]]
        last = max(places.values())
        assert {row for row in rows if int(residual[row]) in ends} == {row for row in rows if places[row] == last}


def test_edits_without_a_separator_make_no_pairs() -> None:
    evidence = bench_of("llama").evidence
    pairs = PairTensors(9, len(EDITS))
    pairs.add_answers(evidence, evidence.edit.long(), torch.arange(len(evidence.edit)))
    assert pairs.tensors(300) == {}


def test_separators_are_no_keys_of_prompts() -> None:
    evidence = bench_of("llama").evidence
    extra = Evidence.extra_keys(evidence.keys[:1], evidence.residuals[:1], 0, position=0, context=SEPARATOR_CONTEXT)
    joined = Evidence.joined([replace(evidence, call=None), extra])
    assert joined.from_own_prompts.tolist() == [True] * len(evidence.edit) + [False]
