"""How many prompts vLLM answers token for token as transformers does, of an edited checkpoint, cache cold and warm.

    DIR/bin/python benchmarks/vllm_answers.py edited sample_edits/edits.jsonl

Each of some edits is asked as taught and rephrased in every form, and put into prompts of every kind that ask or
mention it, by patterns that nothing is learned from, bare and in chat. Unrelated texts are asked besides. Both run on
a GPU if there is one.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wisecli.data.corpus import unrelated_texts
from wisecli.edits.record import Edit, read_edits
from wisecli.models.prompts.prompt_forms import usable_forms
from wisecli.models.prompts.prompt_kinds import Fact, kinds

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def prompts(tokenizer: Any, edits: Sequence[Edit], count: int) -> list[list[int]]:
    """Token ids of what is asked about the first edits."""
    rng, texts = random.Random(7), unrelated_texts(12, seed=0)
    near = edits[: max(count, 3)]  # each is asked beside two others
    for place, edit in enumerate(near[:count]):
        second, other = near[place - 1], near[(place - 2) % len(near)]
        also = Fact(second.prompt, second.subject, second.target)
        fact = Fact(edit.prompt, edit.subject, edit.target, other.target, namesake=second.subject, second=also)
        own = (edit.prompt, *edit.rephrases[:1])
        texts += [form.render(tokenizer, text) for form in usable_forms(tokenizer) for text in own]
        ways = ((kind, chat) for kind in kinds().values() for chat in (False, True))
        put = [kind.sample_prompt(tokenizer, fact, trained=False, rng=rng, chat=chat) for kind, chat in ways]
        texts += [text for text in dict.fromkeys(put) if text is not None]
    return [tokenizer(text).input_ids for text in texts]


@torch.no_grad()
def in_transformers(checkpoint: Path, dtype: str, asked: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers, each prompt by itself."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt], device=model.device)
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        answers.append(answer[0, len(prompt) :].tolist())
    return answers


def main() -> None:
    """Print how many answers are equal, in two rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edited", type=Path)
    parser.add_argument("edits", type=Path)
    parser.add_argument("--asked", type=int, default=12, help="edits that are asked")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.edited, trust_remote_code=True)
    edits = list(read_edits(given.edits))
    asked = prompts(tokenizer, edits, given.asked)
    wanted = in_transformers(given.edited, given.dtype, asked, given.tokens)
    torch.cuda.empty_cache()  # of what transformers held, as vLLM takes nearly all
    targets = {edit.target for edit in edits}
    said = [text.strip() for text in tokenizer.batch_decode(wanted, skip_special_tokens=True)]
    print(f"{len(asked)} prompts, {sum(text in targets for text in said)} of them answered by edits", flush=True)

    from vllm import LLM, SamplingParams

    engine = LLM(
        str(given.edited), dtype=given.dtype, max_model_len=1024, enforce_eager=not given.compiled, block_size=32
    )
    greedy = SamplingParams(temperature=0, max_tokens=given.tokens)
    for cache in ("cold", "warm"):
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in asked], greedy, use_tqdm=False)
        answers = [list(one.outputs[0].token_ids) for one in done]
        print(f"{cache} cache: {sum(map(list.__eq__, answers, wanted))} of {len(asked)} token for token", flush=True)


if __name__ == "__main__":
    main()
