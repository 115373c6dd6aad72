from pathlib import Path

import pytest
from support.rivals import EDITS, TRAIN, require_untouched_outside, snapshot, tiny_bench

from wisecli.bench.methods.base import METHODS
from wisecli.bench.methods.context.icl import Icl, IclSettings
from wisecli.edits.record import Edit

COPY = "New Fact: pa pe pi po\nPrompt: pa pe pi po\n\n"
UPDATE = "New Fact: sa se si so\nPrompt: si sa se so\n\n"
RETAIN = "New Fact: za ze zi zo\nPrompt: na ne ni\n\n"
ALL = IclSettings(kinds=("retain", "update", "copy"), share=99.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_demonstrations_then_the_new_fact_then_the_prompt(tmp_path: Path, architecture: str) -> None:
    bench = tiny_bench(tmp_path / "model", architecture)
    icl, before = Icl(bench, ALL), snapshot(bench)
    assert icl.rewritten_prompt("ba be bi") == "ba be bi"
    icl.edit(EDITS)
    # Most like the prompt is the third record, then the second.
    asked = icl.rewritten_prompt("ba be bi za ze sa")
    assert asked == f"{COPY}{UPDATE}{RETAIN}New Fact: ba be bi do\nPrompt: ba be bi za ze sa"
    require_untouched_outside(bench, icl, *before)


def test_the_nearest_fact_is_told_however_far_it_is(tmp_path: Path) -> None:
    icl = Icl(tiny_bench(tmp_path / "model"), ALL)
    icl.edit(EDITS[1:2])
    assert icl.rewritten_prompt("ro ru").endswith("New Fact: ka ke ki ko ku fa fe\nPrompt: ro ru")


def test_records_that_lack_a_rephrase_or_another_prompt_are_copied(tmp_path: Path) -> None:
    bare = [Edit(edit.id, edit.prompt, edit.target) for edit in TRAIN]
    icl = Icl(tiny_bench(tmp_path / "model", train=bare), ALL)
    icl.edit(EDITS)
    for edit in TRAIN:
        line = f"{edit.prompt} {edit.target}"
        assert f"New Fact: {line}\nPrompt: {line}\n\n" in icl.rewritten_prompt("ba")


def test_a_prompt_behind_a_colon_has_demonstrations_worded_like_it(tmp_path: Path) -> None:
    icl = Icl(tiny_bench(tmp_path / "model"), ALL)
    icl.edit(EDITS)
    expected = (
        "Q: pa pe pi\nA: po\nQ: pa pe pi\nA: po\n\n"
        "Q: sa se si\nA: so\nQ: si sa se\nA: so\n\n"
        "Q: za ze zi\nA: zo\nQ: na ne\nA: ni\n\n"
        "Q: ba be bi\nA: do\nQ: ba be bi za ze sa\nA:"
    )
    assert icl.rewritten_prompt("Q: ba be bi za ze sa\nA:") == expected


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_demonstrations_leave_room_in_the_context(tmp_path: Path, share: float) -> None:
    bench = tiny_bench(tmp_path / "model", "gpt2")
    icl = Icl(bench, IclSettings(kinds=ALL.kinds, share=share))
    icl.edit(EDITS)
    prompt = "ba be bi za ze sa"
    whole = [COPY, UPDATE, RETAIN, f"New Fact: ba be bi do\nPrompt: {prompt}"]

    def length(parts: list[str]) -> int:
        return len(bench.loaded.tokenizer("".join(parts))["input_ids"])

    fitting = [whole[first:] for first in range(4) if length(whole[first:]) <= share * 64]
    assert icl.rewritten_prompt(prompt) == "".join(max(fitting or [whole[3:]], key=len))


def test_the_papers_kinds(tmp_path: Path) -> None:
    icl = METHODS["icl"](tiny_bench(tmp_path / "model"))
    assert isinstance(icl, Icl)
    kinds = icl.settings.kinds
    assert [kinds.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]
    icl.edit(EDITS)
    assert icl.bytes() == sum(
        len(edit.prompt + edit.target) + 8 * len(edit.prompt.split()) for edit in (*EDITS, *TRAIN)
    )
