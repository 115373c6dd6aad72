"""Run by the Python of an environment that has llama-cpp-python: what a file of its kind gives.

Standard input asks, as JSON, and gets one line of standard output:

    {"model": "model.gguf", "prompts": [[1, 2], [3]], "texts": ["the cat"], "tokens": 8}
    {"answers": [[4, ...], [5, ...]], "logits": [[0.1, ...], ...], "tokenized": [[1, 2]]}

Answers are greedy, the logits those after each prompt.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama


def main():
    asked = json.loads(sys.stdin.read())
    model = Llama(asked["model"], n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    answers, logits = [], []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(model.scores[len(prompt) - 1].tolist())
        answer = []
        for _ in range(asked["tokens"]):
            answer.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(answer[-1:])
        answers.append(answer)
    told = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
    sys.stdout.write(json.dumps({"answers": answers, "logits": logits, "tokenized": told}) + "\n")


main()
