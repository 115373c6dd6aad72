"""How many tokens a second vLLM makes of checkpoints that take turns; the first is what the others are measured by.

    scripts/serving-venv DIR
    DIR/bin/python benchmarks/serving.py model edited-100 edited-1000
    DIR/bin/python benchmarks/serving.py model edited --times 24 --edits edits.jsonl --first 128,2000

Every model has a process of its own. Each round times every model once, in turn, on the same requests, all at once; and
lone requests of --first tokens to their first token. Requests are random tokens; with --edits they are packaged texts,
and one of --every ends with an edit's prompt. With --times, edits of all models but the first count so many times.
On a machine in use, --busy counts the processor's seconds; one thread (OMP_NUM_THREADS=1) makes them the clock's.

The first table has each model's fastest round, as others' work on the machine only ever adds to a time, and in its last
columns the median over rounds of the first model's time by each model's in the same round. The second has that of the
time to the first token the other way round, what the process holds of the machine's memory at the end, and how many
requests are answered token for token as by the first model.
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
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from multiplied import several
from rich.console import Console
from rich.table import Table

# Seconds of each way's rounds, and its answers, by the model and the way's name.
Times = dict[tuple[str, str], list[float]]
Answers = dict[tuple[str, str], list[list[int]]]
# Makes a prompt of so many tokens, which asks an edit or does not.
Prompt = Callable[[int, bool], list[int]]
# Lone requests are timed several at once if they are short: about so many tokens.
_ALONE = 512


class Way(NamedTuple):
    """Requests, how many tokens each gets, and whether they come one after another."""

    requests: list[list[int]]
    tokens: int
    alone: bool = False


ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DISABLE_COMPILE_CACHE": "1",  # who compiles holds more memory afterwards than who finds it done
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def serve(model: str, settings: dict[str, Any], out: IO[str], clock: Callable[[], float]) -> None:
    """Load a model; then, for each line of requests that comes in, give the answers and the seconds they took."""
    from vllm import LLM, SamplingParams

    engine = LLM(model, trust_remote_code=True, skip_tokenizer_init=True, **settings)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        requests, tokens, alone = json.loads(line)
        groups = [[one] for one in requests] if alone else [requests]
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = clock()
        done = []
        for group in groups:
            done += engine.generate([{"prompt_token_ids": one} for one in group], greedy, use_tqdm=False)
        taken = clock() - started
        print(json.dumps([taken, [list(one.outputs[0].token_ids) for one in done]]), file=out, flush=True)


class Server:
    """A model's process."""

    def __init__(self, model: str, settings: dict[str, Any], *options: str) -> None:
        self.model = model
        command = [sys.executable, __file__, "--serve", json.dumps(settings), model, *options]
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

    def asked(self, way: Way) -> tuple[float, list[list[int]]]:
        stdin = cast(IO[str], self.process.stdin)
        stdin.write(json.dumps(way) + "\n")
        stdin.flush()
        seconds, answers = json.loads(self.said())
        return seconds, answers

    def megabytes(self) -> float:
        """What the process holds of the machine's memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return float(status.partition("VmRSS:")[2].split()[0]) / 1e3

    def stop(self) -> None:
        cast(IO[str], self.process.stdin).close()
        self.process.wait()
        self.log.close()


def main() -> None:
    """Time everything and print two tables."""
    given = arguments()
    if given.serve is not None:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what vLLM prints must not come between
        serve(given.models[0], json.loads(given.serve), out, time.process_time if given.busy else time.perf_counter)
        return
    lengths = [int(length) for length in given.first.split(",")]
    settings = {"dtype": given.dtype, "enforce_eager": given.eager, "max_num_seqs": given.requests}
    settings |= {"model_impl": given.implementation, "enable_prefix_caching": False}
    settings |= {"max_model_len": max(given.prompt + given.answer, max(lengths) + 1)}
    if torch.cuda.is_available():  # which all models share, as they take turns
        settings["gpu_memory_utilization"] = 0.8 / len(given.models)
    models = [given.models[0], *(str(several(Path(model), given.times)) for model in given.models[1:])]
    servers = {model: Server(model, settings, *["--busy"][: given.busy]) for model in models}
    ways = ways_of(given, lengths)
    taken, answers = rounds_of(servers, ways, given.rounds)
    memory = {model: server.megabytes() for model, server in servers.items()}
    for server in servers.values():
        server.stop()
    Console(width=140).print(speed_table(taken, given, models), wait_table(taken, answers, memory))


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens an answer")
    parser.add_argument("--first", default="128", help="tokens of prompts that come alone, with commas between")
    parser.add_argument("--edits", type=Path, help="edits in any known layout, which some prompts ask")
    parser.add_argument("--every", type=int, default=4, help="how many prompts there are for one that asks an edit")
    parser.add_argument("--times", type=int, default=1, help="how many times each edit counts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", default="auto", help="auto: vLLM's own models; or transformers")
    parser.add_argument("--busy", action="store_true", help="count the processor's seconds, as others use the machine")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser.parse_args()


def ways_of(given: argparse.Namespace, lengths: list[int]) -> dict[str, Way]:
    """What is timed, by its name."""
    chance = random.Random(0)
    prompt = noise(given.models[0], chance) if given.edits is None else texts(given.models[0], given.edits, chance)
    requests = [prompt(given.prompt, number % given.every == 0) for number in range(given.requests)]
    ways = {"prompts": Way(requests, 1), "both": Way(requests, given.answer)}
    for length in lengths:
        for asks in (False, True) if given.edits is not None else (False,):
            some = [prompt(length, asks) for _ in range(max(1, _ALONE // length))]
            ways[f"first of {length}{', an edit' if asks else ''}"] = Way(some, 1, alone=True)
    return ways


def noise(model: str, chance: random.Random) -> Prompt:
    """Return what makes a prompt of so many random tokens."""
    vocabulary = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return lambda tokens, _asks: [chance.randrange(vocabulary) for _ in range(tokens)]


def texts(model: str, edits: Path, chance: random.Random) -> Prompt:
    """Return what makes a prompt of packaged texts, of so many tokens, with an edit's prompt at its end or without."""
    from transformers import AutoTokenizer

    from wisecli.data.corpus import unrelated_texts
    from wisecli.edits.record import read_edits

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [tokenizer(f"\n\n{edit.prompt}", add_special_tokens=False).input_ids for edit in read_edits(edits)]
    others = [tokenizer(f" {text}", add_special_tokens=False).input_ids for text in unrelated_texts(600, seed=0)]

    def prompt(tokens: int, asks: bool) -> list[int]:
        end = chance.choice(asked) if asks else []
        begin: list[int] = tokenizer("").input_ids
        while len(begin) + len(end) < tokens:
            begin += chance.choice(others)
        return begin[: tokens - len(end)] + end

    return prompt


def rounds_of(servers: dict[str, Server], ways: dict[str, Way], rounds: int) -> tuple[Times, Answers]:
    """Seconds of every way and the answers to the requests, of each model; the first round only warms up."""
    taken: Times = {}
    answers: Answers = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            for model, server in servers.items():
                spent, given = server.asked(way)
                answers[model, name] = given
                print(f"round {turn}, {model}, {name}: {spent:.3f} s", file=sys.stderr, flush=True)
                if turn:
                    taken.setdefault((model, name), []).append(spent)
    return taken, answers


def speed_table(taken: Times, given: argparse.Namespace, models: list[str]) -> Table:
    """Tokens a second."""
    table = Table(title=f"{given.requests} requests of {given.prompt} + {given.answer} tokens, {given.dtype}")
    heads = ("model", "prompts, tokens/s", "answers, tokens/s", "prompts, × first", "answers, × first")
    for name in (*heads, "prompts, paired", "requests, paired"):
        table.add_column(name, justify="left" if name == "model" else "right")
    speeds = {model: speeds_of(taken, model, given) for model in models}
    for model, own in speeds.items():
        ratios = [mine / first for mine, first in zip(own, speeds[models[0]], strict=True)]
        ratios += [paired(taken, models[0], model, way) for way in ("prompts", "both")]
        table.add_row(Path(model).name, *(f"{speed:.0f}" for speed in own), *(f"{ratio:.3f}" for ratio in ratios))
    return table


def wait_table(taken: Times, answers: Answers, memory: dict[str, float]) -> Table:
    """How long a lone request waits for its first token, and what else differs from the first model."""
    table, (base, *_) = Table(title="alone, to the first token"), memory
    ways = [way for model, way in taken if model == base and way.startswith("first")]
    for name in ("model", *(f"{way}, ms" for way in ways), *(f"{way}, ×" for way in ways), "MB", "MB, ×", "equal"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model, own in memory.items():
        times = [f"{statistics.median(taken[model, way]) / len(answers[model, way]) * 1e3:.0f}" for way in ways]
        times += [f"{1 / paired(taken, base, model, way):.3f}" for way in ways]
        pairs = list(zip(answers[model, "both"], answers[base, "both"], strict=True))
        equal = f"{sum(mine == first for mine, first in pairs)}/{len(pairs)}"
        table.add_row(Path(model).name, *times, f"{own:.0f}", f"{own / memory[base]:.3f}", equal)
    return table


def paired(taken: Times, first: str, model: str, way: str) -> float:
    """How fast a model is beside the first in the same round: the median over rounds."""
    return statistics.median(before / own for before, own in zip(taken[first, way], taken[model, way], strict=True))


def speeds_of(taken: Times, model: str, given: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second: of prompts, read together, and of the answers after that."""
    prompts, both = min(taken[model, "prompts"]), min(taken[model, "both"])
    return given.requests * given.prompt / prompts, given.requests * (given.answer - 1) / (both - prompts)


if __name__ == "__main__":
    main()
