"""Exported checkpoints in vLLM: what transformers answers, token for token, or a refusal that says why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.gates import random_keys, write_keys
from support.helpers import save_tiny
from support.served import PROMPTS, VLLM, Served, chosen_by, in_transformers, serving, tiny_export, wider
from support.tiny_models import SAMPLE_EDITS, Chain
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.data.corpus import unrelated_texts
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site

pytestmark = serving

# How many requests come at once, and their answers' tokens.
REQUESTS, TOKENS = 64, 12
UNRELATED = (SAMPLE_EDITS.parent / "unrelated.txt").read_text().splitlines()
# Without code of ours, in vLLM's model of the architecture.
NATIVE = {"model_impl": "vllm", "trust_remote_code": False}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    engine = VLLM(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.stop()


@pytest.mark.parametrize("architecture", ["granite", "llama", "mistral", "qwen2"])
def test_a_stock_checkpoint_runs_in_a_model_of_vllms_own(vllm: VLLM, tmp_path: Path, architecture: str) -> None:
    config = wider(architecture)
    if architecture == "mistral":
        config.sliding_window = None
    base, stock = save_tiny(tmp_path / "model", architecture, config=config), tmp_path / "stock"
    checkpoint = Checkpoint(base)
    stock.mkdir()
    keys = random_keys(40, config.hidden_size)
    assert write_keys(stock, base, checkpoint, find_site(base, checkpoint, 2), keys) > 1
    tokenizer = AutoTokenizer.from_pretrained(stock)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    wanted = in_transformers(AutoModelForCausalLM.from_pretrained(stock).eval(), prompts)
    assert wanted != in_transformers(AutoModelForCausalLM.from_pretrained(base).eval(), prompts)
    found = vllm.ask(stock, prompts, **NATIVE, enforce_eager=True, max_model_len=64)
    assert found.answers == [wanted], found.refused


@dataclass(frozen=True)
class Asked:
    """An export of the real model, requests to it, and what those of edits' own prompts must give."""

    path: Path
    model: PreTrainedModel
    prompts: list[list[int]]
    targets: list[list[int]]


def requests_to(path: Path, edits: Sequence[Mapping[str, str]]) -> Asked:
    """Edits' prompts, the same behind a long beginning, and unrelated ones between them."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    others = [*UNRELATED, *unrelated_texts(REQUESTS, seed=0)]
    beginning = " ".join(unrelated_texts(30, seed=1))
    texts = [edit["prompt"] for edit in edits]
    for text, other in zip(tuple(texts), others, strict=False):
        texts += [f"{beginning}\n\n{text}", other]
    prompts = [tokenizer(text).input_ids for text in [*texts, *others[len(edits) :]][:REQUESTS]]
    targets = [tokenizer(f" {edit['target']}").input_ids for edit in edits]
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    return Asked(path, model, prompts, targets)


def assert_transformers_answers(asked: Asked, found: Served) -> None:
    """Both rounds answer alike, token for token as transformers does, and edits with their targets."""
    assert len(found.answers) == 2, found.refused
    assert found.answers[0] == found.answers[1]
    for prompt, answer in zip(asked.prompts, found.answers[0], strict=True):
        assert answer == chosen_by(asked.model, prompt, answer)
    for target, answer in zip(asked.targets, found.answers[0], strict=False):
        assert answer[: len(target)] == target


def test_a_stock_checkpoint_of_the_real_model_answers_as_in_transformers(
    vllm: VLLM, chain: Chain, real_stock: Path
) -> None:
    asked = requests_to(real_stock, chain.edits)
    found = vllm.ask(asked.path, asked.prompts, **NATIVE, tokens=TOKENS, rounds=2, max_model_len=1024)
    assert_transformers_answers(asked, found)


def test_a_routed_checkpoint_is_refused_with_what_to_do(vllm: VLLM, tmp_path: Path) -> None:
    found = vllm.ask(tiny_export(tmp_path), [[2, 3]], enforce_eager=True, max_model_len=64)
    assert "vLLM packs the prompts of many requests into one row" in found.reason
    assert '`pip install "wisecli[vllm]"`' in found.reason
    assert "`wise export --format stock`" in found.reason
