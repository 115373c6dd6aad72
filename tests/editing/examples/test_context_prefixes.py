import re
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import save_tiny, tiny_tokenizer
from support.loading import CPU
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from wisecli.data.corpus import reworded_facts, subjects_for, unrelated_texts
from wisecli.editing.examples.context_prefixes import CHAT, greedy_prefixes, in_context
from wisecli.errors import ModelError
from wisecli.models.loading import load_model
from wisecli.models.prompts.chat_template import chat_prompt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA: dict[str, Any] = tomllib.loads(
    resources.files("wisecli").joinpath("data/unrelated.toml").read_text(encoding="utf-8")
)
PROMPTS: list[str] = DATA["prompts"]
WAYS: list[list[str]] = tomllib.loads(
    resources.files("wisecli").joinpath("data/rewordings.toml").read_text(encoding="utf-8")
)["facts"]
TEMPLATE = "{{ bos_token }}{% for turn in messages %}{{ turn.role }} says {{ turn.content }}. {% endfor %}"
OPENINGS = ("I", "You", "Because", "Yes", "Q: ")
ANSWER = "{% if add_generation_prompt %}assistant says{% endif %}"


def matcher(pattern: str) -> re.Pattern[str]:
    """What a pattern may become: a word of the right list, or a number of the right range, in each slot."""
    ranges = {name: [str(number) for number in range(low, high + 1)] for name, (low, high) in DATA["ranges"].items()}
    allowed = {**DATA["slots"], **ranges}
    parts = re.split(r"\{(\w+)\}", pattern)
    parts[0::2] = map(re.escape, parts[0::2])
    parts[1::2] = ("(?:" + "|".join(map(re.escape, allowed[name])) + ")" for name in parts[1::2])
    return re.compile("".join(parts))


@pytest.mark.parametrize("count", [0, 1, len(PROMPTS) - 1, len(PROMPTS), len(PROMPTS) + 1, 600])
def test_there_are_as_many_texts_as_asked_for(count: int) -> None:
    texts = unrelated_texts(count, seed=0)
    assert len(texts) == count
    assert all(text.strip() for text in texts)


def test_all_written_prompts_come_first_and_never_depend_on_the_seed() -> None:
    for seed in (0, 1):
        assert unrelated_texts(len(PROMPTS) + 10, seed=seed)[: len(PROMPTS)] == PROMPTS
    assert unrelated_texts(7, seed=0) == PROMPTS[:7]


def test_the_rest_are_patterns_with_every_slot_filled_from_its_own_list_or_range() -> None:
    count = len(PROMPTS) + 3 * len(DATA["patterns"])
    matchers = {pattern: matcher(pattern) for pattern in DATA["patterns"]}
    used: set[str] = set()
    for text in unrelated_texts(count, seed=0)[len(PROMPTS) :]:
        fitting = [pattern for pattern, one in matchers.items() if one.fullmatch(text)]
        assert fitting, text
        used.update(fitting)
    assert used == set(matchers)


@pytest.mark.parametrize(("draw", "count"), [(unrelated_texts, 300), (reworded_facts, 4)])
def test_the_seed_decides_texts_and_facts(draw: Callable[..., object], count: int) -> None:
    first, again, other = (draw(count, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("count", [50, 130, 299])
def test_fewer_texts_are_the_beginning_of_more(count: int) -> None:
    assert unrelated_texts(count, seed=5) == unrelated_texts(300, seed=5)[:count]


def test_the_texts_given_are_the_callers_own() -> None:
    unrelated_texts(3, seed=0).clear()
    assert unrelated_texts(3, seed=0) == PROMPTS[:3]


def test_most_texts_differ_from_each_other() -> None:
    texts = unrelated_texts(600, seed=0)
    assert len(set(texts)) > 0.9 * len(texts)


def test_every_way_to_ask_for_a_fact_has_the_same_one_slot_that_has_words() -> None:
    assert len(WAYS) > 10
    for ways in WAYS:
        slots = [re.findall(r"\{(\w+)\}", way) for way in ways]
        assert slots == [slots[0]] * len(ways)
        assert len(slots[0]) == 1
        assert slots[0][0] in DATA["slots"]
        assert len(set(ways)) == len(ways)
    assert len({len(ways) for ways in WAYS}) == 1
    assert len({way for ways in WAYS for way in ways}) == sum(map(len, WAYS))


@pytest.mark.parametrize(("texts", "subjects"), [(8, 1), (100, 1), (150, 2), (300, 4), (600, 8), (6000, 8)])
def test_fewer_texts_go_with_fewer_facts(texts: int, subjects: int) -> None:
    assert subjects_for(texts) == subjects


@pytest.mark.parametrize("subjects", [1, 3, 8])
def test_a_fact_is_asked_of_one_subject_in_every_way(subjects: int) -> None:
    facts = reworded_facts(subjects, seed=0)
    assert len(facts) == subjects * len(WAYS)
    for index, fact in enumerate(facts):
        ways = WAYS[index // subjects]
        slot = re.findall(r"\{(\w+)\}", ways[0])[0]
        fitting = [word for word in DATA["slots"][slot] if [w.replace(f"{{{slot}}}", word) for w in ways] == fact]
        assert len(fitting) == 1, fact
    assert len({tuple(fact) for fact in facts}) == len(facts)


def chatting(*, opens: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template that begins with the token for the beginning of text.

    Args:
        opens: the tokenizer puts that token before every text itself.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[BOS]"})
    tokenizer.chat_template = TEMPLATE + ANSWER
    if opens:
        begin = ("[BOS]", tokenizer.convert_tokens_to_ids("[BOS]"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[begin])
    return tokenizer


@pytest.mark.parametrize("opens", [True, False])
def test_a_chat_prompt_is_the_users_turn_and_begins_once(opens: bool) -> None:
    tokenizer = chatting(opens=opens)
    begin = tokenizer.convert_tokens_to_ids("[BOS]")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ba be"}], tokenize=False, add_generation_prompt=True
    )
    assert whole == "[BOS]user says ba be. assistant says"
    tokens = tokenizer(chat_prompt(tokenizer, "ba be"))["input_ids"]
    assert tokens == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokens[0] == begin
    assert tokens.count(begin) == 1


def test_without_a_chat_template_there_is_no_chat_prompt() -> None:
    with pytest.raises(ModelError, match="no chat template; leave out --chat"):
        chat_prompt(tiny_tokenizer(), "ba be")


def test_a_context_stands_before_the_prompt_or_is_the_chat() -> None:
    tokenizer = chatting(opens=False)
    assert in_context(tokenizer, "", "ba be") == "ba be"
    assert in_context(tokenizer, "do du. ", "ba be") == "do du. ba be"
    assert in_context(tokenizer, CHAT, "ba be") == "[BOS]user says ba be. assistant says"


def test_greedy_prefixes_are_five_openings_with_the_likeliest_tokens_after_each(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(tmp_path / "model"), load=CPU)
    found = greedy_prefixes(loaded.model, loaded.tokenizer, 7)
    assert len(found) == 7
    assert greedy_prefixes(loaded.model, loaded.tokenizer, 6) == found[:6]
    for prefix, (opening, count) in zip(found, [*((one, 5) for one in OPENINGS), ("I", 10), ("You", 10)], strict=True):
        ids = torch.tensor([loaded.tokenizer(opening)["input_ids"]])
        said = loaded.model.generate(ids, max_new_tokens=count, do_sample=False)[0]
        assert prefix == f"{loaded.tokenizer.decode(said, skip_special_tokens=True)} "
