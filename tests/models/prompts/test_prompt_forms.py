"""Forms that prompts are asked in."""

from pathlib import Path

import pytest
from support.helpers import save_tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wisecli.errors import ModelError
from wisecli.models.prompts.prompt_forms import forms, usable_forms

PROMPT = "Where was Tom Smithson born?"


def test_five_forms_at_least_are_for_evaluation_alone() -> None:
    assert sum(not form.trained for form in forms().values()) >= 5
    assert sum(form.trained for form in forms().values()) >= 5


@pytest.mark.parametrize("name", sorted(forms()))
def test_a_form_asks_the_prompt_once(real_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    form, other = forms()[name], "Who wrote The Long Hill?"
    asked = form.render(real_tokenizer, PROMPT)
    if form.change is None:
        assert asked.count(PROMPT) == 1
        assert form.render(real_tokenizer, other) == asked.replace(PROMPT, other)
    else:
        assert asked != PROMPT
        assert abs(len(asked) - len(PROMPT)) <= 1
    assert form.render(real_tokenizer, PROMPT) == asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("bare", PROMPT),
        ("question", f"Question: {PROMPT}\nAnswer:"),
        ("wild", f"Please answer the question:\nQ: {PROMPT}\nA:"),
        ("lower case", "where was tom smithson born"),
        ("no question mark", "Where was Tom Smithson born"),
        ("trailing space", f"{PROMPT} "),
    ],
)
def test_what_a_form_asks(real_tokenizer: PreTrainedTokenizerBase, name: str, asked: str) -> None:
    assert forms()[name].render(real_tokenizer, PROMPT) == asked


def test_turns_go_through_the_chat_template(real_tokenizer: PreTrainedTokenizerBase) -> None:
    asked = forms()["second turn"].render(real_tokenizer, PROMPT)
    roles = [part.split("\n")[0] for part in asked.split("<|im_start|>")[1:]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert "Answer in a few words" in forms()["chat with system prompt"].render(real_tokenizer, PROMPT)
    assert "document" in "".join(forms())
    assert len(real_tokenizer(forms()["behind a document"].render(real_tokenizer, PROMPT))["input_ids"]) > 400


def test_misspelt_changes_one_long_word_and_short_ones_not(real_tokenizer: PreTrainedTokenizerBase) -> None:
    form = forms()["misspelt"]
    changed = form.render(real_tokenizer, PROMPT).split()
    assert sum(one != other for one, other in zip(changed, PROMPT.split(), strict=True)) == 1
    assert sorted(form.render(real_tokenizer, PROMPT)) == sorted(PROMPT)
    assert form.render(real_tokenizer, "Who is it?") == "Who is it?"


def test_without_a_chat_template_forms_of_chats_are_left_out(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "model", "llama"))
    assert tokenizer.chat_template is None
    assert {form.name for form in usable_forms(tokenizer)} == {f.name for f in forms().values() if not f.turns}
    assert all(form.trained for form in usable_forms(tokenizer, trained=True))
    with pytest.raises(ModelError, match="has no chat template"):
        forms()["chat"].render(tokenizer, PROMPT)
