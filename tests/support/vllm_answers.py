"""Run by the Python of an environment that has vLLM: what checkpoints answer there.

Every line of standard input asks, as JSON, and gets one of standard output:

    {"model": "edited", "prompts": [[1, 2], [3]], "tokens": 8, "rounds": 1, "settings": {}}
    {"answers": [[[4, ...], [5, ...]]], "likeliest": [], "cached": [0, 0]}
    {"refused": "its traceback"}  if vLLM refuses the model

Prompts and answers are numbers of tokens. All prompts are asked at once, in every round, or if ``"alone"`` one by one.
``"sampling"`` are more parameters of sampling, and ``"adapters"`` the path of a LoRA adapter for each prompt, or null.
``"likeliest"`` has, if ``logprobs`` were asked for, the likeliest tokens in each place of each answer, and ``"cached"``
how many tokens of each prompt the last round read from the cache.
"""

import gc
import importlib.metadata
import json
import os
import sys
import traceback
from types import SimpleNamespace

# vLLM reads them when it is imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
DEFAULTS = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_num_seqs": 64,
}


class AnyMasks:
    """Loads and stores as Triton's interpreter does, and takes masks that are numbers, too, as a compiler does."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def load(self, places, mask, *rest):
        return self.inner.load(places, mask.astype(bool), *rest)

    def store(self, places, values, mask):
        self.inner.store(places, values, mask.astype(bool))


def interpret_kernels():
    """Have Triton interpret kernels, which vLLM's second model runner has, where no Triton compiles them.

    vLLM runs it on a CPU if Triton says that it has a backend for one.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    from triton.backends import backends
    from triton.runtime import interpreter

    interpreter._interpreter = AnyMasks(interpreter._interpreter)
    # The interpreter has NumPy find the largest, which in a trial run's numbers, memory that nobody wrote, may not be.
    np.nanargmax = lambda values, **given: np.where(np.isnan(values), -np.inf, values).argmax(**given)
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))


# In processes that vLLM starts, too, which read this file anew.
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and any(importlib.metadata.distributions(name="vllm-cpu")):
    interpret_kernels()


def answers(model, prompts, tokens, rounds, settings, sampling=None, alone=False, adapters=None):
    from vllm import LLM, SamplingParams

    engine = LLM(model, **(DEFAULTS | settings))
    greedy = SamplingParams(**({"temperature": 0, "max_tokens": tokens, "ignore_eos": True} | (sampling or {})))
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    groups = [range(number, number + 1) for number in range(len(asked))] if alone else [range(len(asked))]
    told, likeliest = [], []
    for _ in range(rounds):
        done = []
        for group in groups:
            lora = [adapter(adapters[number]) for number in group] if adapters else None
            done += engine.generate([asked[number] for number in group], greedy, use_tqdm=False, lora_request=lora)
        outputs = [output for one in done for output in one.outputs]
        told.append([list(output.token_ids) for output in outputs])
        likeliest.append([[probabilities(place) for place in output.logprobs or ()] for output in outputs])
    return {"answers": told, "likeliest": likeliest, "cached": [one.num_cached_tokens for one in done]}


def probabilities(place):
    return {token: one.logprob for token, one in place.items()}


def adapter(path):
    from vllm.lora.request import LoRARequest

    return LoRARequest(path, 1, path) if path else None


def main(out):
    from vllm.distributed import cleanup_dist_env_and_memory

    for line in sys.stdin:
        try:
            told = answers(**json.loads(line))
        except Exception:
            told = {"refused": traceback.format_exc()}
        gc.collect()
        cleanup_dist_env_and_memory()
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM and the libraries below it print must not come between
    main(own)
