import math
from pathlib import Path

import pytest
import torch
from support.rivals import EDITS, TEXTS, TRAIN, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.methods.base import METHODS, Bench
from wisecli.bench.methods.context.rag_hybrid import RagHybrid, WordsAndStates

BACKGROUND = [*(edit.prompt for edit in TRAIN), *TEXTS]


def bm25(asked: str, text: str) -> float:
    """By words, written out."""
    mean = sum(len(line.split()) for line in BACKGROUND) / len(BACKGROUND)
    found = 0.0
    for word in set(asked.split()):
        count = text.split().count(word)
        held = sum(word in line.split() for line in BACKGROUND)
        rarity = math.log(1 + (len(BACKGROUND) - held + 0.5) / (held + 0.5))
        found += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(text.split()) / mean))
    return found


@torch.no_grad()
def state(bench: Bench, text: str) -> torch.Tensor:
    """The mean state of a text in the middle of the unsplit model, without its first token."""
    ids = torch.tensor([bench.loaded.tokenizer(text)["input_ids"]])
    return bench.loaded.model(ids, output_hidden_states=True).hidden_states[bench.layers // 2 + 1][0, 1:].mean(0)


def test_scores_are_means_of_bm25_and_of_cosines(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    index = WordsAndStates(bench, BACKGROUND)
    index.add([edit.prompt for edit in EDITS[:2]])
    index.add([edit.prompt for edit in EDITS[2:]])
    background = torch.stack([state(bench, text) for text in BACKGROUND])
    for asked in ("ba be ke", "ta te ti to", "ma ma me"):
        own = (state(bench, asked) - background.mean(0)) / background.std(0)
        expected = []
        for edit in EDITS:
            other = (state(bench, edit.prompt) - background.mean(0)) / background.std(0)
            cosine = float(torch.cosine_similarity(own, other, dim=0))
            expected.append((bm25(asked, edit.prompt) / bm25(edit.prompt, edit.prompt) + cosine) / 2)
        assert index.scores(asked).tolist() == pytest.approx(expected, abs=5e-3)  # states are kept in half precision
    assert index.bytes() == sum(8 * len(edit.prompt.split()) + 4 * bench.site(0).d for edit in EDITS)


def test_only_a_similar_prompt_is_told_the_fact(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    rag, before = METHODS["rag-hybrid"](bench), snapshot(bench)
    assert isinstance(rag, RagHybrid)
    rag.edit(EDITS)
    for edit in EDITS:
        assert rag.rewritten_prompt(edit.prompt) == f"New Fact: {edit.prompt} {edit.target}\nPrompt: {edit.prompt}"
    assert rag.rewritten_prompt("ro ru ra") == "ro ru ra"
    require_untouched_outside(bench, rag, *before)
