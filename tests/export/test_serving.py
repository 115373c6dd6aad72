"""Exported checkpoints in vLLM: what transformers answers, token for token, or a refusal that says why."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.gates import random_gate
from support.helpers import save_tiny
from support.served import PROMPTS, VLLM, Served, chosen_by, in_transformers, serving, tiny_export, wider
from support.tiny_models import SAMPLE_EDITS, TINY_CONFIGS, Chain, loader_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.commands.export import WeightFiles, export
from wisecli.commands.merge import merge
from wisecli.config import MergeSettings
from wisecli.data.corpus import unrelated_texts
from wisecli.export.stock import write_stock
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.site import find_site

pytestmark = serving

# What vLLM's Transformers backend says of architectures that it does not run; it refuses their base models too.
REFUSED = {
    "falcon": "KeyError: 'vllm'",
    "gpt2": "Following weights were not initialized from checkpoint: {'model.h.",
    "gptj": "KeyError: 'vllm'",
}
# It asks for a processor of images, which tiny models do not have.
SEEING = ("llava", "qwen2_vl")
# How many requests come at once, their answers' tokens, and how many tokens the engine reads at a time.
REQUESTS, TOKENS, CHUNK = 64, 12, 96
MODES: dict[str, dict[str, bool]] = {"compiled": {}, "eager": {"enforce_eager": True}}
UNRELATED = (SAMPLE_EDITS.parent / "unrelated.txt").read_text().splitlines()
# Without code of ours, in vLLM's model of the architecture.
NATIVE = {"model_impl": "vllm", "trust_remote_code": False}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    engine = VLLM(tmp_path_factory.mktemp("engine"))
    yield engine
    engine.stop()


@pytest.mark.parametrize("architecture", sorted(set(TINY_CONFIGS) - {*SEEING}))
def test_every_architecture_answers_as_in_transformers(vllm: VLLM, tmp_path: Path, architecture: str) -> None:
    path = tiny_export(tmp_path, architecture)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    loader = loader_of(architecture)
    wanted = in_transformers(loader.from_pretrained(path, trust_remote_code=True).eval(), prompts)
    assert wanted != in_transformers(loader.from_pretrained(tmp_path / "model").eval(), prompts)
    found = vllm.ask(path, prompts, enforce_eager=True, max_model_len=64)
    if architecture in REFUSED:
        base = vllm.ask(tmp_path / "model", prompts, enforce_eager=True, max_model_len=64)
        assert REFUSED[architecture] in found.reason
        assert base.refused
    else:
        assert found.answers == [wanted], found.refused


@pytest.mark.parametrize("architecture", ["granite", "llama", "mistral", "qwen2"])
def test_a_stock_checkpoint_runs_in_a_model_of_vllms_own(vllm: VLLM, tmp_path: Path, architecture: str) -> None:
    config = wider(architecture)
    if architecture == "mistral":
        config.sliding_window = None
    base, stock = save_tiny(tmp_path / "model", architecture, config=config), tmp_path / "stock"
    checkpoint = Checkpoint(base)
    stock.mkdir()
    gate = random_gate(40, config.hidden_size)  # of more than one block
    write_stock(stock, base, checkpoint, find_site(base, checkpoint, 2), gate)
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


@pytest.fixture(scope="module")
def asked(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    root = tmp_path_factory.mktemp("served")
    merge([chain.shards], root / "memory", MergeSettings(routing="token"))
    export(root / "memory", root / "edited", weights=WeightFiles(link=True))
    return requests_to(root / "edited", chain.edits)


@pytest.mark.parametrize("mode", MODES)
def test_many_requests_at_once_are_answered_as_in_transformers(vllm: VLLM, asked: Asked, mode: str) -> None:
    assert max(map(len, asked.prompts)) > 2 * CHUNK
    found = vllm.ask(
        asked.path,
        asked.prompts,
        tokens=TOKENS,
        rounds=2,
        max_model_len=1024,
        max_num_batched_tokens=CHUNK,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        **MODES[mode],  # on the second round every prompt is in the cache
    )
    assert_transformers_answers(asked, found)


def test_a_stock_checkpoint_of_the_real_model_answers_as_in_transformers(
    vllm: VLLM, chain: Chain, real_stock: Path
) -> None:
    asked = requests_to(real_stock, chain.edits)
    found = vllm.ask(asked.path, asked.prompts, **NATIVE, tokens=TOKENS, rounds=2, max_model_len=1024)
    assert_transformers_answers(asked, found)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("tiny"))


# Changes of an exported checkpoint's code: file, what stands there, and what then does.
NOT_SET_APART = ("modeling_wise.py", "    set_apart(model, module)\n", "")
LIKE_A_LINEAR_LAYER = (
    "side_memory.py",
    "        self.transposed = transposed\n",
    "        self.transposed = transposed\n        self.out_features, self.in_features = base.weight.shape\n",
)
# As in engines that load what they find a place for.
NOT_MISSED = (
    "modeling_wise.py",
    "class WiseLlamaModel(Served, LlamaModel):\n",
    'class WiseLlamaModel(Served, LlamaModel):\n    _keys_to_ignore_on_load_unexpected = [r"down_proj\\.(?!weight)"]\n',
)
NOT_LOADED = (
    "modeling_wise.py",
    "class WiseLlamaModel(Served, LlamaModel):\n",
    'class WiseLlamaModel(Served, LlamaModel):\n    _keys_to_ignore_on_load_unexpected = [r"down_proj\\.probes"]\n',
)
PASSED_BY = (
    "serving.py",
    '{"__module__": __name__})',
    '{"__module__": __name__, "forward": lambda self, states: states})',
)
UNCHECKED = ("modeling_wise.py", "    model.wise_module, model.wise_engine = module, engine\n", "")


def changed(path: Path, root: Path, *changes: tuple[str, str, str]) -> Path:
    """A copy of an export with other code."""
    copied = shutil.copytree(path, root / "changed")
    for name, old, new in changes:
        text = (copied / name).read_text()
        assert text.count(old) == 1, old
        (copied / name).write_text(text.replace(old, new))
    return copied


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([NOT_SET_APART], "'RoutedMatrix' object has no attribute 'in_features'"),
        ([NOT_SET_APART, LIKE_A_LINEAR_LAYER], "There is no module or parameter named 'model.layers.2.mlp.down_proj."),
        (
            [NOT_SET_APART, LIKE_A_LINEAR_LAYER, NOT_MISSED],
            "the edits are lost: RowParallelLinear was put in the place of layers.2.mlp.down_proj",
        ),
        ([NOT_LOADED], "the edits are lost: the memory of layers.2.mlp.down_proj was not loaded"),
        ([PASSED_BY], "the edits are lost: EditedLlamaMLP does not ask layers.2.mlp.down_proj"),
    ],
    ids=["fused", "replaced", "replaced unseen", "not loaded", "passed by"],
)
def test_an_engine_that_loses_the_memory_does_not_start(
    vllm: VLLM, tiny: Path, tmp_path: Path, changes: list[tuple[str, str, str]], said: str
) -> None:
    found = vllm.ask(changed(tiny, tmp_path, *changes), [[2, 3]], enforce_eager=True, max_model_len=64)
    assert said in found.reason


def test_without_the_check_it_would_answer_as_the_base_does(vllm: VLLM, tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny, trust_remote_code=True)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    path = changed(tiny, tmp_path, NOT_SET_APART, LIKE_A_LINEAR_LAYER, NOT_MISSED, UNCHECKED)
    base = in_transformers(AutoModelForCausalLM.from_pretrained(tiny.parent / "model").eval(), prompts)
    assert vllm.ask(path, prompts, enforce_eager=True, max_model_len=64).answers == [base]


def test_a_memory_that_prompts_open_is_refused_with_what_to_do(vllm: VLLM, tmp_path: Path) -> None:
    found = vllm.ask(tiny_export(tmp_path, routing="sequence"), [[2, 3]], enforce_eager=True, max_model_len=64)
    assert "vLLM packs the prompts of many requests into one row" in found.reason
    assert '`pip install "wisecli[vllm]"`' in found.reason
    assert "`wise merge --routing token`" in found.reason
