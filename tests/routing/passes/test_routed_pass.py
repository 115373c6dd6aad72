"""However a prompt is cut, cached, batched, copied or run, a routed model answers as one plain ``generate()`` does."""

import copy
import io
import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.evaluation import edited_model
from support.helpers import WORDS
from support.thorough import examples, few
from support.tiny_models import tiny_model
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)

from wisecli.edits.record import Edit
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.activations import capture
from wisecli.models.running.forward_pass import CACHE_ARGUMENT
from wisecli.models.running.generation import left_padded
from wisecli.models.running.hooks import hooked
from wisecli.routing.deciding.decision import AnswerTokens, Decision, WindowStates
from wisecli.routing.deciding.prompt_window import UNROUTED, Answering, TurnMarks
from wisecli.routing.gating.request_gate import (
    DEEP_GATE,
    DEEP_LOGIT_OFFSET,
    FEATURE_COUNT,
    LOGIT_OFFSET,
    REQUEST_GATE,
    RequestGate,
)
from wisecli.routing.layers.module_types import add_mixin
from wisecli.routing.memories.answer_pairs import AnswerPairs
from wisecli.routing.memories.fact_memory import ANSWER_KEY_MIN_COSINE, ANSWER_WHITENING
from wisecli.routing.passes.routed_pass import ReadLayer, given_answering
from wisecli.routing.passes.token_cache import (
    cache_given,
    cache_returned,
    keep_tokens,
    last_memory,
    length_of,
    tokens_in,
)

EDITS = [Edit(f"edit {number}", word, "be") for number, word in enumerate(WORDS[:6])]
NEW = 6
# The assistant's turn begins with 90 91; 90 begins every turn, and 92 ends it.
MARKS = TurnMarks((90, 91), (90,), (1, 90, 92))
KINDS = {
    "lookup": {"kind": "lookup", "memories": 3},
    "known tokens": {"kind": "lookup", "memories": 3},
    "pairs": {"kind": "lookup", "memories": 3},
    "gated": {"kind": "lookup", "memories": 3},
    "matrices": {"memories": 3},
    "facts in matrices": {"kind": "facts", "memories": 3},
    "by mean": {"memories": 3, "pooling": "mean"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EditedModel]:
    """Gives the model with a kind of memory; each is made when it is first asked for."""
    return cache(lambda kind: made(tmp_path_factory.mktemp("edited"), kind))


@pytest.fixture(scope="module", params=KINDS)
def edited(request: pytest.FixtureRequest, models: Callable[[str], EditedModel]) -> EditedModel:
    return models(request.param)


@pytest.fixture(scope="module")
def lookup(models: Callable[[str], EditedModel]) -> EditedModel:
    return models("lookup")


def made(root: Path, kind: str) -> EditedModel:
    found = edited_model(root, edits=EDITS, **KINDS[kind])  # type: ignore[arg-type]
    found.decoder.wise_marks = MARKS
    found.model.generation_config.eos_token_id = None
    parts = {"known tokens": with_known_tokens, "pairs": with_pairs, "gated": with_gate}
    return parts[kind](found) if kind in parts else found


def with_known_tokens(edited: EditedModel) -> EditedModel:
    """Keys of which some are for tokens that each prompt's answer has in one place or another."""
    routed = edited.routed
    place, token = torch.zeros_like(routed.key_to_edit), torch.zeros_like(routed.key_to_edit)
    for prompt in PROMPTS:
        said, owner = plain(edited.model, prompt), decided(edited, prompt)
        own = (routed.key_to_edit == owner) & (routed.whitening_index == ANSWER_WHITENING)
        free = (own & (place == 0)).nonzero().flatten()[: NEW - 1]
        behind = torch.arange(1, len(free) + 1)
        place[free], token[free] = behind, torch.tensor(said)[behind - 1]
    routed.register_buffer("key_to_place", place)
    routed.register_buffer("key_to_token", token)
    return edited


def test_tokens_that_an_answer_has_in_their_places_are_answered_otherwise(
    models: Callable[[str], EditedModel],
) -> None:
    knowing, others = models("known tokens"), models("lookup")
    assert any(usual(knowing, prompt) != usual(others, prompt) for prompt in PROMPTS)


def test_a_token_knows_its_place_in_an_answer_however_the_row_is_run(lookup: EditedModel) -> None:
    decoder, prompt = lookup.decoder, next(one for one in PROMPTS if decided(lookup, one) != UNROUTED)
    whole, end = torch.tensor([[*prompt, *usual(lookup, prompt)]]), len(prompt) - 1
    expected = (torch.arange(whole.shape[1]) - end).tolist()
    assert 1 not in whole[0, len(prompt) :].tolist()  # which would end the answer
    given = Answering(torch.tensor([decided(lookup, prompt)]), torch.tensor([end]))
    mask = torch.ones_like(whole)
    assert decoder.route(whole, mask, None, given).tokens.place[0].tolist() == expected
    for size in (1, 2):  # a bare text of several tokens is a prompt, so that two come at once where it is known
        cache, places = DynamicCache(config=lookup.model.config), []
        for first in [0, *range(len(prompt), whole.shape[1], size)]:
            part = whole[:, first : first + size if first else len(prompt)]
            route = decoder.route(part, torch.ones_like(part), cache, given if size > 1 else None)
            places += route.tokens.place[0].tolist()
            with given_answering(given if size > 1 else None):
                lookup.model(part, **{CACHE_ARGUMENT: cache})
        assert places == expected


def with_gate(edited: EditedModel) -> EditedModel:
    """Prompts that mean an edit open it if gates by chance let them, of which one reads a layer further up."""
    routed, chance = edited.routed, torch.Generator().manual_seed(4)
    shapes = ((4, 32 + 1), (3, 4 + FEATURE_COUNT + 1), (6, 4 + FEATURE_COUNT + 1), (5, 6 + 1), (1, 5 + 1))
    tensors = {LOGIT_OFFSET: torch.zeros(3), DEEP_LOGIT_OFFSET: torch.zeros(3)}
    for names in (REQUEST_GATE, DEEP_GATE):
        tensors |= {name: torch.randn(shape, generator=chance) for name, shape in zip(names, shapes, strict=True)}
    routed.request_gate, routed.gate_layer = RequestGate(tensors), 1
    add_mixin(edited.decoder.layers[1], ReadLayer)
    # The first gate clearly refuses one in four, and the deep one half of the others.
    routed.request_gate.logit_offset += odds_of_mentions(edited).quantile(0.25) - math.log(0.2 / 0.8)
    routed.deep_gate = RequestGate.deep(tensors)
    odds = odds_of_mentions(edited)
    routed.deep_gate.logit_offset += 2 * odds[odds > math.log(0.2 / 0.8)].quantile(0.45)
    return edited


def odds_of_mentions(edited: EditedModel) -> Tensor:
    """The log-odds that those prompts ask an edit which mean one."""
    found = [edited.decide(collate([Row(tuple(prompt), (2,))])) for prompt in PROMPTS]
    return torch.cat([one.ask_prob for one in found if one.score_ratio[0] > 1 and one.ask_prob is not None]).logit()


def with_pairs(edited: EditedModel) -> EditedModel:
    """Each prompt that opens an edit opens the next one, too, which begins at a token that is often said."""
    routed, alone = edited.routed, edited.routed.decide
    said = Counter(token for prompt in PROMPTS for token in plain(edited.model, prompt)[1:3])
    numbers = torch.arange(3)
    routed.pairs = AnswerPairs(
        {
            "pairs.separator_token_id": torch.tensor([said.most_common(1)[0][0]]),
            "pairs.separators": 2 * ((numbers + 2) % 3),
            "pairs.begins": 2 * numbers,
            "pairs.ends": (torch.arange(6) == 3).to(torch.uint8),
            "pairs.usable": torch.ones(3, dtype=torch.uint8),
        }
    )

    def both(window: WindowStates) -> Decision:
        decision = alone(window)
        opened = decision.memory != UNROUTED
        return replace(decision, second=((decision.memory + 1) % 3).where(opened, UNROUTED))

    routed.decide = both  # type: ignore[method-assign]
    return edited


def bare_prompts(seed: int = 4) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 60, (length,), generator=chance).tolist() for length in (9, 5, 12, 1, 7, 2, 8, 6)]


PROMPTS = [*bare_prompts()[:5], *([90, *prompt, 92, 90, 91] for prompt in bare_prompts()[:5])]


def plain(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settled = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settled)
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


@cache
def _known(model: Any, prompt: tuple[int, ...]) -> list[int]:
    return plain(model, [*prompt])


def usual(edited: EditedModel, prompt: list[int]) -> list[int]:
    """What a plain call answers, asked once."""
    return _known(edited.model, tuple(prompt))


def decided(edited: EditedModel, prompt: list[int]) -> int:
    ids = torch.tensor([prompt])
    found = edited.model.decided(ids, torch.ones_like(ids))  # type: ignore[operator]
    return int(found[0, 0])


def test_of_these_prompts_some_open_a_memory_and_some_none(edited: EditedModel) -> None:
    opened = [decided(edited, prompt) for prompt in PROMPTS]
    assert len(set(opened)) > 2
    assert UNROUTED in opened
    answers = [usual(edited, prompt) for prompt in PROMPTS]
    with edited.unedited():
        before = [plain(edited.model, prompt) for prompt in PROMPTS]
    for memory, answer, unedited in zip(opened, answers, before, strict=True):
        assert (answer != unedited) <= (memory != UNROUTED)
    assert answers != before


def test_two_edits_answer_in_turn_as_in_a_loop_over_tokens(models: Callable[[str], EditedModel]) -> None:
    """The whole model at every token anew, with a hook that adds what a plain loop finds."""
    edited = models("pairs")
    pairs, turned = edited.routed.pairs, 0
    for prompt in [*PROMPTS, *bare_prompts(seed=5)]:
        number = decided(edited, prompt)
        if number == UNROUTED:
            continue
        first, said, separator = number % 3, list[int](), int(pairs.separator_token_id)
        second, passed = (first + 1) % 3, False
        assert number == first + 3 * (second + 1)
        updates = list[Tensor]()
        for place in range(NEW):
            ids = [*prompt, *said]
            key = keys_of(edited, ids)[-1:]
            begins = place > 0 and said[-1] == separator and not passed
            passed |= begins
            owner = torch.tensor([second if passed else first])
            token = AnswerTokens(torch.tensor([ids[-1]]), torch.tensor([place]))
            cosine, at = edited.routed.nearest_keys(key, owner, token)
            residual = int(edited.routed.key_to_residual[at])
            if begins:
                residual = 2 * second
            elif place > 0 and float(cosine) <= ANSWER_KEY_MIN_COSINE:
                residual = -1
            elif not passed and residual == 3:
                residual = 2 * ((first + 2) % 3)
            if set(said) & set(MARKS.special_token_ids):  # one of them has ended the answer
                residual = -1
            none = torch.zeros(edited.manifest.site.d)
            updates.append(none if residual < 0 else edited.routed.residuals[residual])
            said.append(next_token(edited, ids, len(prompt), updates))
        turned += passed
        assert usual(edited, prompt) == said
    assert turned


@torch.no_grad()
def keys_of(edited: EditedModel, ids: list[int]) -> Tensor:
    with edited.unedited():
        return capture(edited.model, edited.manifest.site, collate([Row(tuple(ids), (0,))]), above=False).keys[
            0, : len(ids)
        ]


@torch.no_grad()
def next_token(edited: EditedModel, ids: list[int], prompt: int, updates: list[Tensor]) -> int:
    def add(_module: torch.nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        changed = output.clone()
        for place, update in enumerate(updates):
            changed[0, prompt - 1 + place] += update
        return changed

    handle = edited.routed.register_forward_hook(add)
    with edited.unedited(), hooked(handle):
        logits = edited.model(torch.tensor([ids]), use_cache=False).logits
    return int(logits[0, -1].argmax())


# --- caches and chunks ---


def loop(model: Any, prompt: list[int], sizes: list[int]) -> list[int]:
    """A bare loop of passes over so many tokens each, then greedy."""
    cache: Any = DynamicCache(config=model.config)
    first, said = 0, list[int]()
    for size in sizes:
        logits = model(torch.tensor([prompt[first : first + size]]), use_cache=True, **{CACHE_ARGUMENT: cache}).logits
        first += size
    while len(said) < NEW:
        said.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([said[-1:]]), use_cache=True, **{CACHE_ARGUMENT: cache}).logits
    return said


def prefix(model: Any, prompt: list[int], length: int) -> Any:
    cache = DynamicCache(config=model.config)
    return cache_returned(model(torch.tensor([prompt[:length]]), use_cache=True, **{CACHE_ARGUMENT: cache}))


WAYS: dict[str, Callable[[Any, list[int]], list[int]]] = {
    "no cache": lambda model, prompt: plain(model, prompt, use_cache=False),
    "static cache": lambda model, prompt: plain(model, prompt, cache_implementation="static"),
    "a static cache of ours": lambda model, prompt: plain(
        model, prompt, **{CACHE_ARGUMENT: StaticCache(model.config, max_cache_len=40)}
    ),
    "prompt lookup": lambda model, prompt: plain(model, prompt, prompt_lookup_num_tokens=2),
    "an assistant": lambda model, prompt: plain(model, prompt, assistant_model=tiny_model("llama", seed=9).eval()),
    "early exit": lambda model, prompt: plain(model, prompt, assistant_early_exit=2),
    "guessing ahead by a GenerationConfig": lambda model, prompt: plain(
        model, prompt, generation_config=GenerationConfig(prompt_lookup_num_tokens=2, pad_token_id=0)
    ),
    "one pass and a loop": lambda model, prompt: loop(model, prompt, [len(prompt)]),
}


# Every way with a lookup and with two edits in turn; of the ways of the others, one of each kind.
QUICK = {*product(("lookup", "pairs"), WAYS), *product(KINDS, ("no cache", "early exit", "one pass and a loop"))}


@pytest.mark.parametrize(("edited", "way"), few(product(KINDS, WAYS), QUICK), indirect=["edited"])
@torch.no_grad()
def test_every_way_answers_as_a_plain_call(edited: EditedModel, way: str, sweep: Any) -> None:
    for prompt in sweep(PROMPTS[::2], PROMPTS):
        assert WAYS[way](edited.model, prompt) == usual(edited, prompt), prompt


@settings(deadline=None, max_examples=examples(8, 60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.sampled_from(PROMPTS), size=st.integers(1, 16), cached=st.integers(0, 15))
@torch.no_grad()
def test_chunks_and_cached_beginnings_change_nothing(
    edited: EditedModel, prompt: list[int], size: int, cached: int
) -> None:
    expected = usual(edited, prompt)
    assert plain(edited.model, prompt, prefill_chunk_size=size) == expected
    length = cached % len(prompt)
    if length:
        assert plain(edited.model, prompt, **{CACHE_ARGUMENT: prefix(edited.model, prompt, length)}) == expected
        with edited.unedited():
            there = prefix(edited.model, prompt, length)
        assert plain(edited.model, prompt, **{CACHE_ARGUMENT: there}) == expected


@settings(deadline=None, max_examples=examples(15, 40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.sampled_from([prompt for prompt in PROMPTS if prompt[0] == 90]),
    cuts=st.sets(st.integers(1, 15), max_size=15),
)
@torch.no_grad()
def test_in_a_chat_a_bare_loop_may_cut_the_prompt_anywhere(
    lookup: EditedModel, prompt: list[int], cuts: set[int]
) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(prompt)), len(prompt)]
    sizes = [last - first for first, last in pairwise(places)]
    assert loop(lookup.model, prompt, sizes) == usual(lookup, prompt)


@torch.no_grad()
def test_a_bare_text_that_comes_token_by_token_is_no_prompt(lookup: EditedModel) -> None:
    """Nothing says where it ends: the main memory answers, as of a text that is merely read on."""
    prompt = next(one for one in bare_prompts() if decided(lookup, one) != UNROUTED == decided(lookup, one[:1]))
    with lookup.unedited():
        expected = plain(lookup.model, prompt)
    assert loop(lookup.model, prompt, [1] * len(prompt)) == expected
    assert loop(lookup.model, prompt, [1] * (len(prompt) - 2) + [2]) == usual(lookup, prompt)


@torch.no_grad()
def test_an_answer_that_the_prompt_begins_goes_on(lookup: EditedModel) -> None:
    for prompt in (one for one in PROMPTS if one[0] == 90):
        answer = usual(lookup, prompt)
        if set(answer) & set(MARKS.special_token_ids):
            continue
        for begun in (1, 3):
            whole = [*prompt, *answer[:begun]]
            assert plain(lookup.model, whole, max_new_tokens=NEW - begun) == answer[begun:]
            assert loop(lookup.model, whole, [1] * len(whole))[: NEW - begun] == answer[begun:]


@torch.no_grad()
def test_a_cache_may_be_cropped_copied_and_quantised(lookup: EditedModel) -> None:
    model = lookup.model
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = usual(lookup, prompt)
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        said, cache = output.sequences[0, len(prompt) :].tolist(), cache_returned(output)
        other = copy.deepcopy(cache)
        while len(said) < NEW:
            logits = model(torch.tensor([said[-1:]]), use_cache=True, **{CACHE_ARGUMENT: other}).logits
            said.append(int(logits[0, -1].argmax()))
        assert said == expected
        cache.crop(len(prompt) - 1 - length_of(cache))
        if len(prompt) > 1:
            assert plain(model, prompt, **{CACHE_ARGUMENT: cache}) == expected
        routes = lookup.decoder.route(ids, None, QuantizedCache("fp8", model.config), None)  # type: ignore[union-attr]
        assert int(routes.memory[0, -1]) == decided(lookup, prompt)


@torch.no_grad()
def test_a_quantised_cache_keeps_tokens_as_they_are(lookup: EditedModel) -> None:
    cache = QuantizedCache("fp8", lookup.model.config)
    lookup.model(torch.tensor([PROMPTS[0]]), use_cache=True, **{CACHE_ARGUMENT: cache})
    assert tokens_in(cache, 1, torch.device("cpu"))[0].tolist() == [PROMPTS[0]]


# --- rows ---


@torch.no_grad()
def test_rows_of_a_batch_answer_as_they_do_alone(edited: EditedModel) -> None:
    ids, mask = left_padded(PROMPTS)
    output = edited.model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    assert output[:, ids.shape[1] :].tolist() == [usual(edited, prompt) for prompt in PROMPTS]
    order = mask.argsort(dim=1, descending=True, stable=True)
    right, real = ids.gather(1, order), mask.gather(1, order)
    logits = edited.model(right, attention_mask=real).logits
    for row, prompt in zip(logits, PROMPTS, strict=True):
        assert int(row[len(prompt) - 1].argmax()) == usual(edited, prompt)[0]


@torch.no_grad()
def test_beams_samples_and_several_answers_are_decided_by_their_prompt(edited: EditedModel) -> None:
    ids, mask = left_padded(PROMPTS[:6])
    common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 0}
    beams = edited.model.generate(ids, **common, num_beams=3, do_sample=False)  # type: ignore[operator]
    for row, prompt in zip(beams[:, ids.shape[1] :].tolist(), PROMPTS, strict=False):
        assert row == plain(edited.model, prompt, num_beams=3)
    sampled = []
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(3)
        sampled.append(
            edited.model.generate(ids, **common, do_sample=True, num_return_sequences=2, **options)  # type: ignore[operator]
        )
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[0], sampled[2])


def test_threads_on_one_model_do_not_meet(edited: EditedModel) -> None:
    expected = [usual(edited, prompt) for prompt in PROMPTS]
    found: dict[int, list[int]] = {}

    def work(first: int) -> None:
        for place in range(first, len(PROMPTS), 8):
            found[place] = plain(edited.model, PROMPTS[place])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert [found[place] for place in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("kind", ["lookup", "pairs"])
def test_continuous_batching_answers_as_generate_does(kind: str, models: Callable[[str], EditedModel]) -> None:
    model = copy.deepcopy(models(kind).model)
    settled = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # As many as fit in memory would be, and the mask over them takes seconds to fill.
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found = model.generate_batch(
        PROMPTS, generation_config=settled, continuous_batching_config=batching, progress_bar=False
    )
    answers = [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.split("_")[-1]))]
    assert answers == [usual(models(kind), prompt) for prompt in PROMPTS]


# --- other objects, and gradients ---


def test_a_model_may_be_copied_kept_and_compiled(lookup: EditedModel, sweep: Any) -> None:
    stream = io.BytesIO()
    torch.save(lookup.model, stream)
    stream.seek(0)
    kept = torch.load(stream, weights_only=False)
    compiled = copy.deepcopy(lookup.model)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    for model in (kept, copy.deepcopy(lookup.model), compiled):
        for prompt in sweep(PROMPTS[5:6], PROMPTS):
            assert plain(model, prompt) == usual(lookup, prompt)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_losses_nor_gradients(lookup: EditedModel, reentrant: bool) -> None:
    prompts = [prompt for prompt in PROMPTS if prompt[0] == 90 and decided(lookup, prompt) != UNROUTED][:2]
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(lookup.model).requires_grad_(True)
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        grads: list[Tensor] = []
        for prompt in prompts:
            ids = torch.tensor([[*prompt, 5, 6, 7]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            loss = model(ids, labels=labels, use_cache=False).loss
            model.zero_grad()
            loss.backward()
            grads.append(model.get_parameter("model.layers.1.self_attn.q_proj.weight").grad.clone())  # type: ignore[union-attr]
            grads.append(loss.detach())
        found.append(grads)
    with lookup.unedited():
        ids = torch.tensor([[*prompts[0], 5, 6, 7]])
        unedited = lookup.model(ids).logits
    assert not torch.allclose(unedited, lookup.model(ids).logits)
    for without, with_it in zip(*found, strict=True):
        assert torch.allclose(without, with_it, atol=1e-6)


# --- what is refused, and what a cache holds ---


def test_embeddings_in_the_place_of_tokens_are_refused(lookup: EditedModel) -> None:
    embeds = lookup.model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with pytest.raises(ValueError, match="give it input_ids"):
        lookup.model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="give it input_ids"):
        lookup.model.generate(inputs_embeds=embeds, max_new_tokens=2)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_the_names_of_all_releases(name: str) -> None:
    cache = DynamicCache()
    assert cache_given({"attention_mask": None, name: cache}) is cache
    assert cache_given({name: None}) is None
    assert cache_returned((torch.zeros(1),)) is None


@torch.no_grad()
def test_a_cache_holds_tokens_and_memories_and_does_to_them_what_it_does_to_keys(lookup: EditedModel) -> None:
    ids, mask = left_padded(PROMPTS[:4])
    cache = DynamicCache(config=lookup.model.config)
    lookup.model(ids, attention_mask=mask, use_cache=True, **{CACHE_ARGUMENT: cache})
    found, memories = tokens_in(cache, 4, ids.device)
    assert torch.equal(found, ids.where(mask.bool(), -1))
    last = last_memory(cache)
    assert last is not None
    assert last.tolist() == memories[:, -1].tolist() == [decided(lookup, prompt) for prompt in PROMPTS[:4]]
    cache.reorder_cache(torch.tensor([2, 0]))
    assert torch.equal(tokens_in(cache, 2, ids.device)[0], found[[2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(tokens_in(cache, 4, ids.device)[0], found[[2, 2, 0, 0]])
    cache.crop(-3)
    assert torch.equal(tokens_in(cache, 4, ids.device)[0], found[[2, 2, 0, 0], :-3])
    cache.reset()
    assert tokens_in(cache, 4, ids.device)[0].shape == (4, 0)
    assert last_memory(cache) is None
    keep_tokens(object(), 0, ids, ids)  # what is no cache of transformers' keeps none


@torch.no_grad()
def test_tokens_that_another_model_has_read_are_not_known(lookup: EditedModel) -> None:
    cache = DynamicCache(config=lookup.model.config)
    with lookup.unedited():
        lookup.model(torch.tensor([[5, 6, 7]]), use_cache=True, **{CACHE_ARGUMENT: cache})
    lookup.model(torch.tensor([[8, 9]]), use_cache=True, **{CACHE_ARGUMENT: cache})
    assert tokens_in(cache, 1, torch.device("cpu"))[0].tolist() == [[-1, -1, -1, 8, 9]]


def test_a_models_type_shows_the_arguments_of_its_class(lookup: EditedModel) -> None:
    assert lookup.model._supports_logits_to_keep()
    assert isinstance(lookup.model, PreTrainedModel)
    assert type(lookup.model).__name__ == "LlamaForCausalLM"
    again = tiny_model("llama")
    site = lookup.manifest.site
    site.install(again, lookup.manifest.memory, MARKS)
    assert type(again) is type(lookup.model)


@torch.no_grad()
def test_windows_are_run_to_the_deep_gates_layer_where_the_first_does_not_refuse(
    models: Callable[[str], EditedModel],
) -> None:
    edited = models("gated")
    layers, begun, seen = edited.decoder.layers, [], set()
    with ExitStack() as hooks:
        for number in range(4):
            note = partial(lambda place, *_: begun.append(place), number)
            hooks.enter_context(hooked(layers[number].register_forward_pre_hook(note)))
        for prompt in PROMPTS:
            begun.clear()
            found, ran = edited.decide(collate([Row(tuple(prompt), (2,))])), [*begun]
            window = WindowStates(torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool), torch.empty(0))
            states = plain_states(edited, prompt)
            candidates = edited.routed.candidates(replace(window, states=states[0]))
            wanted = edited.routed.asked(candidates)
            may_open = bool(wanted.memory[0] != UNROUTED)
            if may_open:
                wanted = edited.routed.asked(candidates, states[1])
            assert ran == ([0, 1] if may_open else [0])
            assert torch.equal(found.memory, wanted.memory)
            seen.add((bool(wanted.score_ratio[0] > 1), may_open, bool(found.memory[0] != UNROUTED)))
    # Nothing is mentioned; the first gate refuses; the deep one does; an edit opens.
    assert seen == {(False, False, False), (True, False, False), (True, True, False), (True, True, True)}


def plain_states(edited: EditedModel, prompt: list[int]) -> list[Tensor]:
    """What leaves each layer of the unedited model."""
    with edited.unedited():
        return list(edited.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[1:])
