from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from support.capturing import capture_examples
from support.helpers import hooked, keys_of, raised, site_of, tiny_tokenizer
from support.tiny_models import TYPICAL, tiny_model
from torch import Tensor, nn

from wisecli.artifacts.masks import random_mask
from wisecli.artifacts.shard import Evidence, Mask
from wisecli.config import EditSettings
from wisecli.editing.evidence.shard_evidence import gather_evidence, thinned
from wisecli.editing.examples.context_prefixes import CHAT, in_context
from wisecli.editing.examples.prompt_variants import AnswerKey
from wisecli.editing.examples.training_examples import TrainingExamples, encode_edits, write_contexts
from wisecli.editing.writers.target_accuracy import learnt
from wisecli.edits.record import Edit
from wisecli.errors import ModelError
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded

EDITS = [Edit("one", "ba be bi", "do du"), Edit("two", "ka ke ki ko", "fa"), Edit("three", "ma me", "ga ge gi")]
FORMS_WITHOUT_CHAT = ["<question>", "<instruction>", "<unmarked>", "<paragraph>"]
# Numbers that are no places in the list, as in a later shard.
NUMBERED = list(enumerate(EDITS, start=4))
CONTEXTS = [(0, ""), (1, "pa pe. "), (2, "so su sa. ")]
TEMPLATE = "{% for m in messages %}za {{ m['content'] }} ze{% endfor %}{% if add_generation_prompt %} zi{% endif %}"
FOREIGN = ("The report says that it was called", "When was the old bridge built?")


def loaded_of(architecture: str, *, chat: bool = False) -> Loaded:
    model, tokenizer = tiny_model(architecture), tiny_tokenizer()
    model.generation_config.eos_token_id = 1
    if chat:
        tokenizer.chat_template = TEMPLATE
    return Loaded(model.requires_grad_(False), tokenizer)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return loaded_of("llama", chat=True)


@pytest.fixture(scope="module")
def site(loaded: Loaded) -> MatrixSite:
    return site_of(loaded.model, 2)


def words(loaded: Loaded, text: str) -> list[int]:
    tokens: list[int] = loaded.tokenizer(text)["input_ids"]
    return tokens


def expected_keys(loaded: Loaded, site: MatrixSite, edit: Edit, context: str) -> Tensor:
    """Keys that predict an edit's target and the end of text, from the whole model on this row alone."""
    prompt, target = words(loaded, context + edit.prompt), words(loaded, edit.target)
    return keys_of(loaded.model, site, prompt + target)[len(prompt) - 1 :]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_contexts_are_the_bare_prompt_then_the_chat_then_prefixes_and_one_more(
    loaded: Loaded, count: int, chat: bool
) -> None:
    settings = EditSettings(contexts=count, context_tokens=4, chat=chat, in_forms=False)
    contexts = write_contexts(loaded, settings)
    given = 2 if chat else 1
    assert contexts[:given] == ["", CHAT][:given]
    assert len(contexts) == given + count + 1
    assert all(prefix.endswith(". ") and prefix[:-2].strip() for prefix in contexts[given:])
    assert CHAT not in contexts[given:]
    assert write_contexts(loaded, settings) == contexts
    assert write_contexts(loaded, replace(settings, seed=1)) != contexts


def test_contexts_of_a_lookup_are_forms_that_the_tokenizer_can_write(loaded: Loaded) -> None:
    bare, *forms, held_out = write_contexts(loaded, EditSettings(contexts=5, context_tokens=4))
    assert bare == ""
    assert forms == [*([CHAT] if loaded.tokenizer.chat_template else []), *FORMS_WITHOUT_CHAT]
    assert held_out.endswith(". ")
    asked = [in_context(loaded.tokenizer, form, "ba be bi?") for form in FORMS_WITHOUT_CHAT]
    assert asked[0] == "Question: ba be bi?\nAnswer:"
    assert asked[2] == "ba be bi"


@pytest.mark.parametrize(
    ("context", "prompt"), [("", "ba be bi"), ("pa pe. ", "pa pe ba be bi"), (CHAT, "za ba be bi ze zi")]
)
@pytest.mark.parametrize("train_end", [True, False])
def test_rows_hold_the_prompt_in_its_context_and_the_target_after_it(
    loaded: Loaded, context: str, prompt: str, train_end: bool
) -> None:
    (row,) = encode_edits(loaded, EDITS[:1], context, train_end=train_end)
    assert list(row.prompt) == words(loaded, prompt)
    assert list(row.target) == [*words(loaded, "do du"), *([1] if train_end else [])]


def test_an_edit_of_which_no_token_is_left_is_named(loaded: Loaded) -> None:
    for edit in (Edit("hush", "?!", "fa"), Edit("hush", "fa", "?!")):
        with pytest.raises(ModelError, match=r"'hush'.*reword it"):
            encode_edits(loaded, [EDITS[0], edit], "", train_end=True)


def test_without_a_chat_template_the_chat_context_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template; leave out --chat"):
        encode_edits(loaded_of("llama"), EDITS, CHAT, train_end=True)


def examples_of(loaded: Loaded, site: MatrixSite, *, batch_size: int = 4) -> list[TrainingExamples]:
    return capture_examples(loaded, site, NUMBERED, CONTEXTS, batch_size=batch_size, train_end=True)


def evidence_of(loaded: Loaded, site: MatrixSite) -> Evidence:
    def first_entries(keys: Tensor, answers: Sequence[AnswerKey], positions: Tensor) -> Tensor:
        edits = torch.tensor([answer.edit for answer in answers])
        return torch.cat([keys[:, :2], edits[:, None].float(), positions[:, None].float()], dim=1)

    return gather_evidence(examples_of(loaded, site), 2, first_entries)


def test_evidence_holds_the_whole_models_keys_of_every_target_token(architecture: str) -> None:
    loaded = loaded_of(architecture)
    site = site_of(loaded.model, 2)
    evidence = evidence_of(loaded, site)
    where = list(zip(evidence.edit.tolist(), evidence.context.tolist(), evidence.position.tolist(), strict=True))
    for place, (edit, context, position) in enumerate(where):
        expected = expected_keys(loaded, site, EDITS[edit - 4], CONTEXTS[context][1])[position]
        torch.testing.assert_close(evidence.keys[place], expected, rtol=0, atol=1e-4)
    every = {(n, c, p) for (n, e), (c, _) in product(NUMBERED, CONTEXTS) for p in range(len(e.target.split()) + 1)}
    assert len(set(where)) == len(where)
    assert set(where) <= every
    assert {one for one in every if one[1] in (0, 2)} <= set(where)
    assert evidence.held_out.tolist() == [context == 2 for _, context, _ in where]
    expected = torch.cat([evidence.keys[:, :2], torch.tensor([[edit, place] for edit, _, place in where])], dim=1)
    assert torch.equal(evidence.residuals, expected)


def test_lessons_of_any_batch_size_make_the_same_evidence(loaded: Loaded, site: MatrixSite) -> None:
    whole, single = (
        {
            (edit, context): (examples.activations.keys[row], examples.activations.batch.labels[row])
            for examples in examples_of(loaded, site, batch_size=size)
            for row, (edit, context) in enumerate(zip(examples.edits.tolist(), examples.contexts.tolist(), strict=True))
        }
        for size in (9, 1)
    )
    assert whole.keys() == single.keys() == {(n, c) for (n, _), (c, _) in product(NUMBERED, CONTEXTS)}
    for place, (keys, labels) in single.items():
        length = len(labels)
        assert torch.equal(whole[place][1][:length], labels)
        torch.testing.assert_close(whole[place][0][:length], keys, rtol=0, atol=1e-4)


def made_up(cosines: dict[tuple[int, int, int], float], *, held_out: int) -> Evidence:
    """Evidence of (edit, position, context) whose key has this cosine with the bare prompt's."""
    keys = torch.tensor([[cosine, (1 - cosine**2) ** 0.5, 0.0] for cosine in cosines.values()])
    edit, position, context = torch.tensor(list(cosines)).T
    scale = torch.arange(1, len(keys) + 1)[:, None]
    return Evidence(keys * scale, keys, edit, position, context, context == held_out, torch.zeros(len(keys)) > 0)


def test_keys_as_good_as_the_bare_prompts_are_left_out_but_never_those_held_back() -> None:
    cosines = {
        (0, 0, 0): 1.0,
        (0, 0, 1): 0.999,  # the same again
        (0, 0, 2): 0.999,  # held back
        (0, 1, 0): 1.0,
        (0, 1, 1): 0.97,  # another
        (0, 1, 3): 0.985,
        (2, 0, 1): 0.999,  # its bare prompt is not there
        (2, 1, 0): 1.0,
        (2, 1, 3): -1.0,
    }
    evidence = made_up(cosines, held_out=2)
    kept = thinned(evidence)
    left = list(zip(kept.edit.tolist(), kept.position.tolist(), kept.context.tolist(), strict=True))
    assert left == [place for place in cosines if place not in {(0, 0, 1), (0, 1, 3)}]
    rows = [list(cosines).index(place) for place in left]
    for name in Evidence.__dataclass_fields__:
        before, after = getattr(evidence, name), getattr(kept, name)
        assert after is None if before is None else torch.equal(after, before[rows])


@torch.no_grad()
def share_right(loaded: Loaded, site: MatrixSite, edit: Edit, context: str, delta: Tensor) -> list[bool]:
    """Which target tokens are the arg-max: the whole model, changed from the prompt's last token on."""
    prompt, target = words(loaded, context + edit.prompt), [*words(loaded, edit.target), 1]
    start = len(prompt) - 1

    def change(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.cat([output[:, :start], output[:, start:] + inputs[0][:, start:] @ delta.T], dim=1)

    with hooked(loaded.model, site, change):
        logits = loaded.model(input_ids=torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, start:]
    return [int(row.argmax()) == token for row, token in zip(logits, target, strict=True)]


def teaching(loaded: Loaded, site: MatrixSite, mask: Mask, contexts: list[str]) -> Tensor:
    """Values that push the keys of two edits towards their targets' embeddings, so that some tokens come out right."""
    head = loaded.model.get_output_embeddings().get_parameter("weight")
    delta = torch.zeros(site.d, site.d_ff)
    for edit, context in product(EDITS[:2], contexts):
        targets = head[torch.tensor([*words(loaded, edit.target), 1])]
        for wanted, key in zip(targets, expected_keys(loaded, site, edit, context), strict=True):
            delta += 8 * torch.outer(wanted, key) / key.square().sum()
    return delta[:, mask.indices]


@pytest.mark.parametrize("architecture", TYPICAL)
@pytest.mark.parametrize("context", [0, 1, None])
def test_what_counts_as_learnt_is_what_the_whole_model_says(architecture: str, context: int | None) -> None:
    loaded = loaded_of(architecture)
    site = site_of(loaded.model, 2)
    raised(loaded.model, site)
    mask = random_mask(site, 0.9, "columns", torch.Generator().manual_seed(2))
    looked_at = [text for number, text in CONTEXTS if context in (None, number)]
    values = teaching(loaded, site, mask, looked_at)
    found = learnt(loaded.model, site, mask, values, examples_of(loaded, site), context=context)
    for number, edit in NUMBERED:
        right = [one for text in looked_at for one in share_right(loaded, site, edit, text, mask.dense(values))]
        assert found[number] == pytest.approx(sum(right) / len(right))
    assert found.keys() == dict(NUMBERED).keys()
    assert len({*found.values()}) > 1
