from pathlib import Path

from support.rivals import EDITS, TRAIN, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.methods.base import METHODS
from wisecli.bench.methods.context.rag_shots import RagShots


def test_a_similar_prompt_is_told_demonstrations_and_the_fact(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    rag, before = RagShots(bench, count=2), snapshot(bench)
    assert rag.rewritten_prompt("ba be bi") == "ba be bi"
    rag.edit(EDITS)
    updates = [(edit.prompt, edit.target, edit.rephrases[0] if edit.rephrases else edit.prompt) for edit in TRAIN[:2]]
    told = "".join(f"New Fact: {prompt} {target}\nPrompt: {other} {target}\n\n" for prompt, target, other in updates)
    assert rag.rewritten_prompt("bi be ba") == f"{told}New Fact: ba be bi do\nPrompt: bi be ba"
    told = "".join(f"Q: {prompt}\nA: {target}\nQ: {other}\nA: {target}\n\n" for prompt, target, other in updates)
    assert rag.rewritten_prompt("bi be ba A:") == f"{told}Q: ba be bi\nA: do\nbi be ba A:"
    require_untouched_outside(bench, rag, *before)


def test_a_prompt_for_which_nothing_is_found_stands_alone(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path / "model")
    rag = METHODS["rag-shots"](bench)
    rag.edit(EDITS)
    for elsewhere in ("ro ru ra", "sa se si"):
        assert rag.rewritten_prompt(elsewhere) == elsewhere
