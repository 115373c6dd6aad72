from collections.abc import Iterable

import pytest
from support.byte_level import save_tokenizer
from support.helpers import save_tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wisecli.data.corpus import notes
from wisecli.data.request_wordings import requests
from wisecli.edits.record import Edit, Translation
from wisecli.export.stock.subject_texts import (
    SubjectText,
    texts_behind_others,
    texts_on_edits,
    texts_on_names,
    texts_on_near_names,
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
    # Everyday prompts are answered there.
    replies = (*requests().replies, *(text for text, _ in notes().notes))
    told = [str(tokenizer.decode(list(tokens))).endswith(replies) for tokens in more]
    assert 0.1 < sum(told) / len(told) < 0.9


def test_own_prompts_are_read_behind_other_texts_up_to_the_name(tokenizer: PreTrainedTokenizerBase) -> None:
    edit = Edit("two", "Which river flows through Bravik?", "Ole", subject="Bravik")
    texts = list(texts_behind_others(tokenizer, [(edit, 4)]))
    found = {str(tokenizer.decode(list(one.tokens))) for one in texts}
    assert len(found) == 2
    assert all(text.endswith("Which river flows through Bravik") and len(text) > 100 for text in found)
    assert all((one.subject, one.place) == (4, len(one.tokens) - 1) for one in texts)


def test_near_names_have_texts_in_which_the_last_word_stands_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    edit = Edit("two", "The keeper of Old Mill is", "Ole", subject="Old Mill")
    assert len(alone(tokenizer, texts_on_near_names(tokenizer, [(edit, 0)]))) == 4
    # Where it is an edit's subject itself, there are none.
    other = Edit("three", "The mill is", "Ta", subject="mill")
    assert not alone(tokenizer, texts_on_near_names(tokenizer, [(edit, 0), (other, 1)]))


def alone(tokenizer: PreTrainedTokenizerBase, texts: Iterable[SubjectText]) -> list[str]:
    """Those of texts that say of a mill what notes say of a subject."""
    told = [text.split("{subject}")[0].casefold() for text, _ in notes().about]
    found = [ends(tokenizer, one).casefold() for one in texts]
    return [text for text in found if any(text.endswith((f"{one}mill", f"{one}the mill")) for one in told)]
