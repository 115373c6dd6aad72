"""The real model with the default memory in vLLM's own model: what transformers answers, token for token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.served import EAGER, OWN, VLLM, Runner, Served, in_transformers, logits_in_transformers, serving
from support.tiny_models import Chain
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.memory.merge import merge
from wisecli.config import MergeSettings
from wisecli.data.corpus import unrelated_texts
from wisecli.routing.deciding.prompt_window import UNROUTED

pytestmark = serving

TOKENS, CHUNK = 12, 96


@dataclass(frozen=True)
class Asked:
    """An export of the real model, what it is asked, and what transformers answers."""

    path: Path
    model: PreTrainedModel
    tokenizer: Any
    edits: list[dict[str, str]]
    prompts: list[list[int]]
    answers: list[list[int]]

    def chat(self, *turns: str) -> list[int]:
        """The tokens of a chat, whose turns begin with the user's."""
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids


@pytest.fixture(scope="module")
def asked(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """72 prompts: edits' own, in chats, later turns, an answer begun, behind a text, two at once; and unrelated."""
    root = tmp_path_factory.mktemp("served")
    merge([chain.shards], root / "memory", MergeSettings())
    export(root / "memory", root / "edited", weights=WeightFiles(link=True))
    tokenizer = AutoTokenizer.from_pretrained(root / "edited", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(root / "edited", trust_remote_code=True).eval()
    bare = Asked(root / "edited", model, tokenizer, chain.edits, [], [])
    beginning, others = " ".join(unrelated_texts(30, seed=1)), unrelated_texts(16, seed=0)
    prompts: list[list[int]] = []
    for edit in chain.edits[:8]:
        text = edit["prompt"]
        prompts += [tokenizer(text).input_ids, bare.chat(text), bare.chat("Hello!", "Hello, how can I help?", text)]
        prompts += [bare.chat(text) + tokenizer("The answer is").input_ids, bare.chat(text, "Good.", "Thank you!")]
        prompts += [tokenizer(f"{beginning}\n\n{text}").input_ids]
        prompts += [bare.chat(f"{text} {chain.edits[-1]['prompt']}")]
    for text in others[:8]:
        prompts += [tokenizer(text).input_ids[:64], bare.chat(text[:100])]
    answers = in_transformers(model, prompts, tokens=TOKENS)
    return Asked(root / "edited", model, tokenizer, chain.edits, prompts, answers)


def assert_answers(asked: Asked, found: Served, *, rounds: int = 1) -> None:
    assert found.answers == [asked.answers] * rounds, found.refused


@torch.no_grad()
def test_what_is_asked_of_the_real_model_is_answered_by_edits(asked: Asked) -> None:
    assert max(map(len, asked.prompts)) > 2 * CHUNK
    model: Any = asked.model
    decided = [model.decided(ids, torch.ones_like(ids)) for ids in map(row, asked.prompts)]
    assert 30 <= sum(int(one[0, 0]) != UNROUTED for one in decided) < len(decided)
    assert sum(int(one[0, 0]) >= len(model.config.wise["memory"]["thresholds"]) for one in decided) >= 4  # two at once


def row(prompt: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(prompt)])


@pytest.mark.parametrize("mode", [{}, {"enforce_eager": True}], ids=["compiled", "eager"])
def test_many_requests_at_once_in_chunks_cold_and_warm(vllm: VLLM, asked: Asked, mode: dict[str, bool]) -> None:
    found = vllm.ask(
        asked.path,
        asked.prompts,
        tokens=TOKENS,
        rounds=2,
        max_model_len=1024,
        max_num_batched_tokens=CHUNK,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,
        **OWN,
        **mode,
    )
    assert_answers(asked, found, rounds=2)


def test_one_request_after_another_cold_and_warm(vllm: VLLM, asked: Asked) -> None:
    found = vllm.ask(
        asked.path,
        asked.prompts,
        tokens=TOKENS,
        rounds=2,
        asking={"alone": True},
        max_model_len=1024,
        block_size=32,
        **EAGER,
    )
    assert_answers(asked, found, rounds=2)


def test_requests_that_are_preempted(vllm: VLLM, asked: Asked) -> None:
    found = vllm.ask(
        asked.path, asked.prompts, tokens=TOKENS, max_model_len=1024, block_size=32, num_gpu_blocks_override=60, **EAGER
    )
    assert_answers(asked, found)


def test_guessed_tokens(tmp_path: Path, asked: Asked, runner: Runner) -> None:
    guessing = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    # Of its own, as what guesses leaves vLLM unable to load another model in its process.
    engine = VLLM(tmp_path, plugin=True, runner=runner)
    found = engine.ask(
        asked.path, asked.prompts, tokens=TOKENS, max_model_len=1024, speculative_config=guessing, **EAGER
    )
    engine.stop()
    assert_answers(asked, found)


def test_several_answers_with_probabilities(vllm: VLLM, asked: Asked) -> None:
    more = {"n": 2, "temperature": 1.0, "top_k": 1, "logprobs": 5, "prompt_logprobs": 1}
    found = vllm.ask(asked.path, asked.prompts, tokens=TOKENS, asking={"sampling": more}, max_model_len=1024, **EAGER)
    assert found.answers, found.refused
    assert found.answers[0] == [answer for answer in asked.answers for _ in range(2)]
    for number in range(0, len(asked.prompts), 3):
        logits = logits_in_transformers(asked.model, asked.prompts[number], tokens=TOKENS)
        places = found.likeliest[0][2 * number]
        for token, place, wanted in zip(asked.answers[number], places, logits.log_softmax(-1), strict=True):
            assert max(place, key=lambda one: place[one]) == token
            assert place == pytest.approx({one: float(wanted[one]) for one in place}, abs=1e-2)


def test_samples_begin_as_edits_have_it(vllm: VLLM, asked: Asked) -> None:
    prompts = [asked.tokenizer(edit["prompt"]).input_ids for edit in asked.edits]
    prompts += [asked.chat(edit["prompt"]) for edit in asked.edits]
    more = {"n": 4, "temperature": 0.7, "seed": 1}
    found = vllm.ask(asked.path, prompts, tokens=3, rounds=2, asking={"sampling": more}, max_model_len=1024, **EAGER)
    assert found.answers, found.refused
    assert found.answers[0] == found.answers[1]
    targets = [asked.tokenizer(f"{space}{edit['target']}").input_ids for space in (" ", "") for edit in asked.edits]
    begun = [answer[0] == targets[number // 4][0] for number, answer in enumerate(found.answers[0])]
    assert sum(begun) >= 0.95 * len(begun)


def test_next_turns_are_the_same_behind_a_cache_of_what_an_edit_answered(vllm: VLLM, asked: Asked) -> None:
    turns = [[*prompt, *answer] for prompt, answer in zip(asked.prompts, asked.answers, strict=True)]
    turns = [[*turn, *asked.chat("And what else do you know of it?")] for turn in turns]
    wanted = in_transformers(asked.model, turns, tokens=TOKENS)
    found = vllm.ask(
        asked.path,
        [*asked.prompts, *turns],
        tokens=TOKENS,
        rounds=2,
        asking={"alone": True},
        max_model_len=1024,
        block_size=32,
        **EAGER,
    )
    assert found.answers == [[*asked.answers, *wanted]] * 2, found.refused
