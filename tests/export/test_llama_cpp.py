"""GGUF files in llama.cpp: tokens and logits are transformers' own of the checkpoint that they were written from."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.byte_level import LAYER, save_stock, save_wide_stock
from support.tiny_models import Chain
from transformers import AutoModelForCausalLM, AutoTokenizer

from wisecli.data.corpus import texts_to_measure_with
from wisecli.export.gguf.gguf_file import GGUF_NAME, write_gguf
from wisecli.export.stock.stock_manifest import read_stock
from wisecli.io.checkpoint import read_json
from wisecli.models.prompts.chat_template import chat_prompt

PYTHON = os.environ.get("WISE_LLAMA_PYTHON") or os.environ.get("WISE_SERVING_PYTHON", "")


def has_llama_cpp() -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llama_cpp') is None)"
    return bool(PYTHON) and subprocess.run([PYTHON, "-c", code], check=False).returncode == 0


pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        not has_llama_cpp(),
        reason="WISE_SERVING_PYTHON names no environment with llama-cpp-python; `scripts/serving-venv DIR` makes one",
    ),
]
SCRIPT = Path(__file__).parents[1] / "support" / "llama_answers.py"
TEXTS = ("the cat sat", "That hat's 1234 mats!", "<|im_start|>user\nthe mat<|im_end|>\n", "naïve — ünï\tcode  x")


def asked(**request: Any) -> dict[str, Any]:
    """What llama.cpp gives."""
    command, told = [str(PYTHON), str(SCRIPT)], json.dumps(request)
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Its attention cache is in half precision, whatever the weights are.
@pytest.mark.parametrize(("quantize", "apart"), [("f32", 1e-2), ("f16", 3e-2), ("q8_0", 0.3)])
def test_llama_cpp_gives_what_transformers_gives(tmp_path: Path, quantize: Any, apart: float) -> None:
    stock = save_stock(tmp_path)
    write_gguf(tmp_path / GGUF_NAME, stock, [LAYER + 1], quantize)
    compare(tmp_path / GGUF_NAME, stock, apart, answers=quantize == "f32")


@pytest.mark.parametrize("architecture", ["llama", "granite"])
@pytest.mark.parametrize(("quantize", "apart"), [("f32", 1e-2), ("q8_0", 0.3)])
def test_a_wider_stream_and_attention_of_blocks_are_what_transformers_has(
    tmp_path: Path, architecture: str, quantize: Any, apart: float
) -> None:
    stock = save_wide_stock(tmp_path, architecture)
    write_gguf(tmp_path / GGUF_NAME, stock, [LAYER + 1, LAYER + 2], quantize)
    # Of random models some next tokens are as good as level.
    compare(tmp_path / GGUF_NAME, stock, apart, answers=False)


@torch.no_grad()
def compare(path: Path, stock: Path, apart: float, *, answers: bool) -> None:
    """Tokens and logits are alike, and answers if they are to be."""
    tokenizer, model = AutoTokenizer.from_pretrained(stock), AutoModelForCausalLM.from_pretrained(stock).eval()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = asked(model=str(path), prompts=prompts, texts=TEXTS, tokens=6)
    assert found["tokenized"] == prompts
    for prompt, logits, answer in zip(prompts, found["logits"], found["answers"], strict=True):
        ids = torch.tensor([prompt])
        np.testing.assert_allclose(logits, model(input_ids=ids).logits[0, -1].numpy(), atol=apart)
        if answers:
            said = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert answer == said[0, len(prompt) :].tolist()


def test_edits_are_answered_and_all_else_as_by_the_base_models_own_file(
    chain: Chain, real_stock: Path, tmp_path: Path
) -> None:
    blocks = read_stock(real_stock).blocks(read_json(real_stock / "config.json")["num_hidden_layers"])
    write_gguf(tmp_path / "edited.gguf", real_stock, blocks, "q8_0")
    write_gguf(tmp_path / "base.gguf", chain.model, (), "q8_0")
    tokenizer = AutoTokenizer.from_pretrained(real_stock)
    texts = [edit["prompt"] for edit in chain.edits]
    texts += [chat_prompt(tokenizer, text) for text in texts]
    others = texts_to_measure_with(20)
    prompts = [tokenizer(text)["input_ids"] for text in (*texts, *others)]
    edited, base = (
        asked(model=str(tmp_path / name), prompts=prompts, texts=texts, tokens=12)
        for name in ("edited.gguf", "base.gguf")
    )
    assert edited["tokenized"] == prompts[: len(texts)]
    targets = [edit["target"] for edit in chain.edits] * 2
    for target, answer in zip(targets, edited["answers"], strict=False):
        said = tokenizer.decode(
            answer[: answer.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in answer else answer
        )
        assert said.strip() == target
    assert edited["answers"][len(texts) :] == base["answers"][len(texts) :]
