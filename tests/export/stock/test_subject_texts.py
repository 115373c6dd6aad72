from __future__ import annotations

import pytest
from support.byte_level import save_tokenizer
from support.helpers import save_tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wisecli.edits.record import Edit, Translation
from wisecli.export.stock.subject_texts import (
    SubjectText,
    texts_on_edits,
    texts_on_names,
    texts_on_other_things,
)
from wisecli.models.prompts.prompt_forms import usable_forms

EDIT = Edit(
    "one", "The mayor of Bravik is", "Ole", subject="Bravik", translations=(Translation("no", "Bravik styres av", "O"),)
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Of bytes, so that every text can be read back."""
    directory = save_tiny(tmp_path_factory.mktemp("texts") / "model")
    for path in directory.glob("token*"):
        path.unlink()
    save_tokenizer(directory)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return found


def ends(tokenizer: PreTrainedTokenizerBase, one: SubjectText) -> str:
    """The text up to the place of a subject's last token."""
    return str(tokenizer.decode(list(one.tokens[: one.place + 1])))


def test_own_prompts_are_read_in_all_forms_up_to_the_last_letter_of_the_name(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    found = list(texts_on_edits(tokenizer, [(EDIT, 3)]))
    assert {one.subject for one in found} == {3}
    assert all(ends(tokenizer, one).casefold().endswith("bravik") for one in found)
    texts = [str(tokenizer.decode(list(one.tokens))) for one in found]
    own = {form.render(tokenizer, text) for text in (EDIT.prompt, "Bravik styres av") for form in forms(tokenizer)}
    assert own <= set(texts)
    assert len(set(texts) - own) > 5


def forms(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    return list(usable_forms(tokenizer, trained=True))


def test_some_texts_around_a_name_are_in_small_letters(tokenizer: PreTrainedTokenizerBase) -> None:
    small = ["bravik" in str(tokenizer.decode(list(one.tokens))) for one in texts_on_edits(tokenizer, [(EDIT, 0)])]
    assert 0 < sum(small) < len(small) / 2


def test_a_subject_of_two_edits_has_the_texts_around_it_once(tokenizer: PreTrainedTokenizerBase) -> None:
    one = list(texts_on_edits(tokenizer, [(EDIT, 0)]))
    again = Edit("two", "Bravik lies in", "Norge", subject="Bravik")
    both = list(texts_on_edits(tokenizer, [(EDIT, 0), (again, 0)]))
    assert both[: len(one)] == one
    assert len(both) - len(one) == len(forms(tokenizer))


def test_a_prompt_without_the_name_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    edit = Edit("one", "The mayor of Bravik is", "Ole", subject="Skien")
    found = list(texts_on_edits(tokenizer, [(edit, 0)]))
    assert found
    assert all(ends(tokenizer, one).casefold().endswith("skien") for one in found)


def test_made_up_names_are_numbered_and_as_many_as_a_share_of_them(tokenizer: PreTrainedTokenizerBase) -> None:
    few, more = (list(texts_on_names(tokenizer, share)) for share in (0.01, 0.1))
    for texts in (few, more):
        numbers = sorted({one.subject for one in texts})
        assert numbers == list(range(len(numbers)))
        assert all(0 <= one.place < len(one.tokens) for one in texts)
    assert len(few) < len(more)
    assert few == list(texts_on_names(tokenizer, 0.01))


def test_places_at_which_no_name_ends_leave_out_the_names_of_all_edits(tokenizer: PreTrainedTokenizerBase) -> None:
    inner = Edit("two", "The mayor is", "Norge", subject="mayor")
    one = next(iter(texts_on_edits(tokenizer, [(EDIT, 0), (inner, 1)])))
    assert ends(tokenizer, one) == "The mayor of Bravik"
    within, around = ("".join(tokenizer.decode([one.tokens[place]]) for place in some) for some in (one[3], one[4]))
    assert within == "Bravi"
    # Without the letter at which the other edit's subject ends.
    assert around == "The mayo of  is"


def test_texts_on_other_things_are_drawn_the_same_again_and_a_share_of_them(tokenizer: PreTrainedTokenizerBase) -> None:
    few, more = (texts_on_other_things(tokenizer, share) for share in (0.04, 0.1))
    assert 0 < len(few) < len(more)
    assert few == texts_on_other_things(tokenizer, 0.04)
