"""A tiny model with a tokenizer of bytes, as a stock checkpoint with a gate: what can be written as GGUF."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from support.blocks import random_block
from support.gates import random_keys, write_keys
from support.tiny_models import TINY_CONFIGS
from wisecli.export.stock.checkpoint.decoder_block import AddedBlocks
from wisecli.export.stock.stock_checkpoint import write_stock
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site

LAYER, VOCABULARY, HIDDEN, WIDE = 2, 320, 32, 64
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(directory: Path, pre: Any = None, *, template: str | None = CHATML) -> None:
    """A small byte-level BPE."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(["the cat sat on the mat 1234", "that hat is the cat's"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(directory)


def save_base(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    tiny = TINY_CONFIGS[architecture]
    config = type(tiny)(**{**tiny.to_dict(), "vocab_size": VOCABULARY, "tie_word_embeddings": True, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_stock(root: Path, **changes: Any) -> Path:
    base, output = save_base(root / "base", **changes), root / "stock"
    output.mkdir()
    checkpoint = Checkpoint(base)
    keys = random_keys(5, HIDDEN, loud=1.0)
    write_keys(output, base, checkpoint, find_site(base, checkpoint, LAYER), keys)
    return output


def save_wide_stock(root: Path, architecture: str = "llama") -> Path:
    """With more channels, and blocks of which the second one's attention reads what the first one writes to them."""
    base, output = save_base(root / "base", architecture), root / "stock"
    output.mkdir()
    checkpoint, config = Checkpoint(base), AutoConfig.from_pretrained(base)
    blocks = [random_block(config, WIDE, seed=seed, reads=seed > 0, scale=0.1) for seed in range(2)]
    write_stock(output, base, checkpoint, find_site(base, checkpoint, LAYER), AddedBlocks(blocks), WIDE - HIDDEN)
    return output
