"""Run by the Python of an environment that has vLLM: what checkpoints answer there.

Every line of standard input asks, as JSON, and gets one of standard output:

    {"model": "edited", "prompts": [[1, 2], [3]], "tokens": 8, "rounds": 1, "settings": {}}
    {"answers": [[[4, ...], [5, ...]]]}  or, if vLLM refuses the model,  {"refused": "its traceback"}

Prompts and answers are numbers of tokens. All prompts are asked at once, in every round.
"""

import gc
import json
import os
import sys
import traceback

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


def answers(model, prompts, tokens, rounds, settings):
    from vllm import LLM, SamplingParams

    engine = LLM(model, **(DEFAULTS | settings))
    greedy = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        [list(one.outputs[0].token_ids) for one in engine.generate(asked, greedy, use_tqdm=False)]
        for _ in range(rounds)
    ]


def main(out):
    from vllm.distributed import cleanup_dist_env_and_memory

    for line in sys.stdin:
        try:
            told = {"answers": answers(**json.loads(line))}
        except Exception:
            told = {"refused": traceback.format_exc()}
        gc.collect()
        cleanup_dist_env_and_memory()
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM and the libraries below it print must not come between
    main(own)
