"""How many tokens a second vLLM makes of checkpoints that take turns; the first is what the others are measured by.

    scripts/serving-venv DIR
    DIR/bin/python benchmarks/serving.py model edited-100 edited-1000

Every model has a process of its own. Each round times every model once, in turn, on the same requests of random tokens,
all at once and the first by itself; the table has each model's fastest round, as others' work on the machine only ever
adds to a time. In its last columns are the median over rounds of the first model's time by each model's in the same
round, of the time to a lone request's first token the other way round, and how many requests are answered token for
token as by the first model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def serve(model: str, settings: dict[str, Any], out: IO[str]) -> None:
    """Load a model; then, for each line of requests that comes in, give the answers and the seconds they took."""
    from vllm import LLM, SamplingParams

    engine = LLM(model, trust_remote_code=True, skip_tokenizer_init=True, **settings)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        requests, tokens = json.loads(line)
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": one} for one in requests], greedy, use_tqdm=False)
        taken = time.perf_counter() - started
        print(json.dumps([taken, [list(one.outputs[0].token_ids) for one in done]]), file=out, flush=True)


class Server:
    """A model's process."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.model = model
        command = [sys.executable, __file__, "--serve", json.dumps(settings), model]
        self.log = Path(f"{Path(model).name}.log").open("w", encoding="utf-8")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.said()

    def said(self) -> str:
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            sys.exit(f"{self.model}: vLLM has stopped; {self.log.name} says why")
        return line

    def asked(self, requests: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        stdin = cast(IO[str], self.process.stdin)
        stdin.write(json.dumps([requests, tokens]) + "\n")
        stdin.flush()
        seconds, answers = json.loads(self.said())
        return seconds, answers

    def stop(self) -> None:
        cast(IO[str], self.process.stdin).close()
        self.process.wait()
        self.log.close()


def main() -> None:
    """Time everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", default="auto", help="auto: vLLM's own models; or transformers")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    given = parser.parse_args()
    if given.serve is not None:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what vLLM prints must not come between
        serve(given.models[0], json.loads(given.serve), out)
        return
    settings = {"dtype": given.dtype, "enforce_eager": given.eager, "max_num_seqs": given.requests}
    settings |= {"model_impl": given.implementation}
    settings |= {"max_model_len": given.prompt + given.answer, "enable_prefix_caching": False}
    vocabulary = json.loads((Path(given.models[0]) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    chance = random.Random(0)
    requests = [[chance.randrange(vocabulary) for _ in range(given.prompt)] for _ in range(given.requests)]
    servers = {model: Server(model, settings) for model in given.models}
    ways = {"first": (requests[:1], 1), "prompts": (requests, 1), "both": (requests, given.answer)}
    taken: dict[tuple[str, str], list[float]] = {}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(given.rounds + 1):  # the first round only warms up
        for model, server in servers.items():
            for way, asked in ways.items():
                spent, answers[model] = server.asked(*asked)
                print(f"round {turn}, {model}, {way}: {spent:.2f} s", file=sys.stderr, flush=True)
                if turn:
                    taken.setdefault((model, way), []).append(spent)
    for server in servers.values():
        server.stop()
    table = Table(title=f"{given.requests} requests of {given.prompt} + {given.answer} tokens, {given.dtype}")
    heads = ("model", "prompts, tokens/s", "answers, tokens/s", "prompts, × first", "answers, × first")
    for name in (*heads, "prompts, paired", "requests, paired", "first token, ×", "equal"):
        table.add_column(name, justify="left" if name == "model" else "right")
    speeds = {model: speeds_of(taken, model, given) for model in given.models}
    for model, own in speeds.items():
        ratios = [mine / first for mine, first in zip(own, speeds[given.models[0]], strict=True)]
        ratios += [paired(taken, given.models[0], model, way) for way in ("prompts", "both")]
        ratios += [1 / paired(taken, given.models[0], model, "first")]
        equal = sum(mine == first for mine, first in zip(answers[model], answers[given.models[0]], strict=True))
        cells = [f"{speed:.0f}" for speed in own] + [f"{ratio:.3f}" for ratio in ratios]
        table.add_row(Path(model).name, *cells, f"{equal}/{len(requests)}")
    Console(width=140).print(table)


def paired(taken: dict[tuple[str, str], list[float]], first: str, model: str, way: str) -> float:
    """How fast a model is beside the first in the same round: the median over rounds."""
    return statistics.median(before / own for before, own in zip(taken[first, way], taken[model, way], strict=True))


def speeds_of(taken: dict[tuple[str, str], list[float]], model: str, given: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second: of prompts, read together, and of the answers after that."""
    prompts, both = min(taken[model, "prompts"]), min(taken[model, "both"])
    return given.requests * given.prompt / prompts, given.requests * (given.answer - 1) / (both - prompts)


if __name__ == "__main__":
    main()
