"""Edited checkpoints with the default memory in vLLM's own models: what transformers answers, token for token."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.every_type import save_type
from support.served import (
    PROMPTS,
    VLLM,
    Served,
    export_of,
    in_engine,
    in_transformers,
    logits_in_transformers,
    serving,
    tiny_export,
)
from support.tiny_models import TINY_CONFIGS, Chain, loader_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.memory.merge import merge
from wisecli.config import MergeSettings, SiteName
from wisecli.data.corpus import unrelated_texts
from wisecli.routing.deciding.prompt_window import UNROUTED

pytestmark = serving

# In vLLM's own model, without the checkpoint's code.
OWN = {"model_impl": "auto", "trust_remote_code": False}
EAGER = {**OWN, "enforce_eager": True}
# vLLM refuses the base models of these, too: sizes as odd as tiny ones, heads that are not tied.
REFUSED = ("falcon", "gemma2")
# It asks for a processor of images, which tiny models do not have.
SEEING = ("llava", "qwen2_vl")
TOKENS, CHUNK = 12, 96


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    engine = VLLM(tmp_path_factory.mktemp("engine"), plugin=True)
    yield engine
    engine.stop()


@pytest.mark.parametrize("architecture", sorted(set(TINY_CONFIGS) - {*SEEING}))
def test_every_architecture_answers_as_in_transformers(vllm: VLLM, tmp_path: Path, architecture: str) -> None:
    path = tiny_export(tmp_path, architecture)
    prompts = prompts_of(path)
    loader = loader_of(architecture)
    wanted = in_transformers(loader.from_pretrained(path, trust_remote_code=True).eval(), prompts)
    assert wanted != in_transformers(loader.from_pretrained(tmp_path / "model").eval(), prompts)
    found = vllm.ask(path, prompts, max_model_len=64, **EAGER)
    if architecture in REFUSED:
        assert found.refused
        assert vllm.ask(tmp_path / "model", prompts, max_model_len=64, **EAGER).refused
    else:
        assert found.answers == [wanted], found.refused


def answers_as_in_transformers(vllm: VLLM, path: Path, **settings: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Require it of an edited checkpoint; gives what it was asked and answered."""
    prompts = prompts_of(path)
    wanted = in_transformers(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval(), prompts)
    found = vllm.ask(path, prompts, max_model_len=64, **settings)
    assert found.answers == [wanted], found.refused
    return prompts, wanted


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
def test_mixtures_answer_as_in_transformers(vllm: VLLM, tmp_path: Path, model_type: str) -> None:
    path = export_of(save_type(tmp_path / "model", model_type, hidden_size=128, head_dim=32), tmp_path)
    prompts, wanted = answers_as_in_transformers(vllm, path, **EAGER)
    assert wanted != in_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), prompts)


def test_edits_behind_a_layer_answer_in_a_compiled_model(vllm: VLLM, tmp_path: Path) -> None:
    answers_as_in_transformers(vllm, tiny_export(tmp_path, "olmo2"), **OWN)


@pytest.mark.parametrize("site", ["matrix", "layer"])  # the matrix is cut, and what leaves a layer is not
def test_two_processes_answer_as_one(vllm: VLLM, tmp_path: Path, site: SiteName) -> None:
    path = tiny_export(tmp_path, "llama" if site == "matrix" else "olmo2", site=site)
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    answers_as_in_transformers(vllm, path, **EAGER, **two)


def test_facts_in_matrices_answer_as_in_transformers(vllm: VLLM, tmp_path: Path) -> None:
    prompts, wanted = answers_as_in_transformers(vllm, tiny_export(tmp_path, mode="retrieve", site="matrix"), **EAGER)
    assert wanted != in_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), prompts)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_run_beside_edits(vllm: VLLM, tmp_path: Path) -> None:
    path = tiny_export(tmp_path)
    prompts = prompts_of(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    plain = in_transformers(model, prompts)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    torch.manual_seed(0)
    adapted: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = in_transformers(adapted, prompts)
    assert wanted != plain
    asked = [prompt for prompt in prompts for _ in range(2)]
    adapters = [None, str(tmp_path / "adapter")] * len(prompts)
    # On a CPU vLLM gives an adapter to all requests of a step that holds one with it, edited or not: one by one.
    asking = {"adapters": adapters, "alone": True}
    found = vllm.ask(path, asked, asking=asking, enable_lora=True, max_model_len=64, **EAGER)
    assert found.answers, found.refused
    assert found.answers[0][::2] == plain
    assert found.answers[0][1::2] == wanted


def test_transformers_never_loads_the_base_alone_beside_it(tmp_path: Path) -> None:
    found = json.loads(in_engine("beside_vllm.py", str(tiny_export(tmp_path))))
    assert found == {"sent": True, "trusted": "ValueError", "not trusted": "ValueError"}


def prompts_of(path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


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
    """72 prompts: edits' own, as chats, as later turns, with an answer begun, behind a text and two at once; and
    unrelated ones.
    """
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


def test_guessed_tokens(tmp_path: Path, asked: Asked) -> None:
    guessing = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engine = VLLM(tmp_path, plugin=True)  # what guesses leaves vLLM unable to load another model in its process
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


def test_a_model_is_refused_whose_requests_nobody_tells_of(vllm: VLLM, tmp_path: Path) -> None:
    path = tiny_export(tmp_path)
    found = vllm.ask(path, [[2, 3]], max_model_len=64, **EAGER, worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")
    assert "an edited model needs a worker of its own" in found.refused
