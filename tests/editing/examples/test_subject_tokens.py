"""By which tokens prompts name subjects."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from wisecli.editing.examples.subject_tokens import subject_spellings
from wisecli.edits.record import Edit
from wisecli.routing.deciding.subject_match import SUBJECT_MATCH, SubjectMatch
from wisecli.routing.memories.subject_tensors import subject_match_tensors


def edit(subject: str | None, prompt: str = "Who designed {}?") -> Edit:
    return Edit(subject or "none", prompt.format(subject or "it"), "Somebody", subject=subject)


def named(real_tokenizer: PreTrainedTokenizerBase, subject: str, prompt: str) -> bool:
    words = subject_spellings(real_tokenizer, [edit(subject)])
    ids = torch.tensor([real_tokenizer(prompt)["input_ids"]])
    return bool(SubjectMatch(subject_match_tensors([words[subject]]), 1)(ids, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("subject", "prompt"),
    [
        ("Toodyay Fire Station", "Toodyay Fire Station was built by which architect?"),
        ("Toodyay Fire Station", "Who drew the plans of toodyay fire station?"),
        ("Battle of the Java Sea", "When did the battle on the Java Sea begin?"),
        ("Charlotte of Schaumburg-Lippe", "What was Charlotte the mother's name Schaumburg-Lippe?"),
        ("4 Sagittarii", "Which constellation has 4 Sagittarii in it?"),
        ("LinkedIn", "Since when has LinkedIn been there?"),
    ],
)
def test_a_rephrase_names_its_subject(real_tokenizer: PreTrainedTokenizerBase, subject: str, prompt: str) -> None:
    assert named(real_tokenizer, subject, prompt)


@pytest.mark.parametrize(
    ("subject", "prompt"),
    [
        ("Toodyay Fire Station", "Who designed the fire station of Perth?"),
        ("Battle of the Java Sea", "When did the Battle of Hastings begin?"),
        ("Toodyay Fire Station", "What is the capital of France?"),
    ],
)
def test_a_prompt_about_something_else_does_not(
    real_tokenizer: PreTrainedTokenizerBase, subject: str, prompt: str
) -> None:
    assert not named(real_tokenizer, subject, prompt)


def test_shares_add_up_and_rare_words_count_more(real_tokenizer: PreTrainedTokenizerBase) -> None:
    ((words, *_),) = subject_spellings(real_tokenizer, [edit("The Java Sea")]).values()
    assert sum(word.share for word in words) == pytest.approx(1)
    share = {real_tokenizer.decode([word.tokens[0]]).strip().casefold(): word.share for word in words}
    assert share["the"] < share["sea"]


def test_only_edits_whose_own_prompt_names_their_subject_have_words(real_tokenizer: PreTrainedTokenizerBase) -> None:
    without = edit("Ada Lovelace", "Who wrote the first program?")
    edits = [edit("Mount Fuji"), edit(None), without, edit("?!")]
    assert list(subject_spellings(real_tokenizer, edits)) == ["Mount Fuji"]
    assert subject_spellings(real_tokenizer, [edit(None)]) == {}


def test_names_point_at_sorted_tokens(real_tokenizer: PreTrainedTokenizerBase) -> None:
    words = subject_spellings(real_tokenizer, [edit("Mount Fuji"), edit("Mount Etna")])
    tensors = subject_match_tensors([words["Mount Fuji"], (), words["Mount Etna"]])
    assert tuple(tensors) == SUBJECT_MATCH
    tokens, spelling, edits, named, naming, _ = tensors.values()
    assert bool((tokens.diff() > 0).all())
    assert set(naming.tolist()) == set(spelling.tolist())
    assert set(edits.tolist()) == {0, 2}
    assert set(named.tolist()) == set(range(len(edits)))
    assert subject_match_tensors([(), ()]) == {}
