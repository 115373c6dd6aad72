from pathlib import Path

import pytest
from support.rivals import EDITS, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.methods.base import METHODS
from wisecli.bench.methods.context.rag import Rag


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_only_a_similar_prompt_is_told_the_fact(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    rag, before = METHODS["rag"](bench), snapshot(bench)
    assert isinstance(rag, Rag)
    assert rag.rewritten_prompt("ba be bi") == "ba be bi"
    rag.edit(EDITS[:2])
    rag.edit(EDITS[2:])
    assert rag.rewritten_prompt("bi be ba") == "New Fact: ba be bi do\nPrompt: bi be ba"
    assert rag.rewritten_prompt("bi be ba A:") == "Q: ba be bi\nA: do\nbi be ba A:"
    assert rag.rewritten_prompt("ta te ti to") == "New Fact: ta te ti to la le\nPrompt: ta te ti to"
    for elsewhere in ("ro ru ra", "sa se si", "ba ra re ri ro ru"):
        assert rag.rewritten_prompt(elsewhere) == elsewhere
    require_untouched_outside(bench, rag, *before)
    assert rag.bytes() == sum(len(edit.prompt + edit.target) + 8 * len(edit.prompt.split()) for edit in EDITS)
