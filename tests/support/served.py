"""Exported checkpoints in the engines that serve them, in an environment of their own."""

import copy
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from support.helpers import save_tiny
from support.loading import CPU
from support.tiny_models import TINY_CONFIGS
from wisecli.commands.checkpoint.export import export
from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, LoadOptions, MergeSettings, SiteName

_PYTHON = os.environ.get("WISE_SERVING_PYTHON", "")
# Of tests that need the engines.
serving = [
    pytest.mark.serving,
    pytest.mark.skipif(
        not _PYTHON, reason="WISE_SERVING_PYTHON names no interpreter; `scripts/serving-venv DIR` makes one"
    ),
]
_SUPPORT = Path(__file__).parent
# In vLLM's own model, without the checkpoint's code; and without torch.compile.
OWN = {"model_impl": "auto", "trust_remote_code": False}
EAGER = {**OWN, "enforce_eager": True}
# What vLLM's attention on a CPU can do at the least, in the tiny models' four heads.
_HEAD = 32

Tokens = list[list[int]]
# One of vLLM's model runners.
Runner = Literal["first", "second"]

EDITS = (("ba be bi", "do du"), ("ka ke ki ko", "fa"), ("ma me", "ga ge gi"))
PROMPTS = (*(prompt for prompt, _ in EDITS), "so su sa", "ti", "lo la le li lu")


def tiny_export(
    root: Path,
    architecture: str = "llama",
    *,
    mode: Literal["lookup", "retrieve"] = "lookup",
    site: SiteName = "auto",
    subjects: Sequence[str] = (),
) -> Path:
    """A tiny model of an architecture, edited and exported."""
    base = save_tiny(root / "model", architecture, config=wider(architecture))
    return export_of(base, root, mode=mode, site=site, subjects=subjects)


def export_of(
    base: Path,
    root: Path,
    *,
    mode: Literal["lookup", "retrieve"] = "lookup",
    site: SiteName = "auto",
    subjects: Sequence[str] = (),
    layer: str = "2",
    load: LoadOptions = CPU,
) -> Path:
    """A tiny model, edited and exported; what the edits are about need not be said."""
    edits = [{"prompt": prompt, "target": target} for prompt, target in EDITS]
    for one, subject in zip(edits, subjects, strict=False):
        one["subject"] = subject
    lines = [json.dumps(one) for one in edits]
    (root / "edits.jsonl").write_text("\n".join(lines))
    settings = EditSettings(unrelated_texts=64, layer=layer, site=site)
    edit(str(base), root / "edits.jsonl", root / "shards", settings, load=load)
    merge([root / "shards"], root / "memory", MergeSettings(mode=mode))
    export(root / "memory", root / "edited", load=load)
    return root / "edited"


def _own_environment() -> dict[str, str]:
    """What a program of the engine's environment is run with: the packages there are its own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def in_engine(script: str, *arguments: str) -> str:
    """The last line that a script of this directory prints, run by the Python of the engine's environment."""
    command = [_PYTHON, str(_SUPPORT / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_own_environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().rpartition("\n")[2]


@contextmanager
def openai_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of vLLM's server of a checkpoint, with the plugin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    settings = {"VLLM_PLUGINS": "wise", "VLLM_CACHE_ROOT": str(log.parent), "HF_HUB_OFFLINE": "1"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w", encoding="utf-8") as written:
        process = subprocess.Popen(
            [*command, *options], stdout=written, stderr=subprocess.STDOUT, env={**_own_environment(), **settings}
        )
    try:
        while True:
            assert process.poll() is None, log.read_text(encoding="utf-8")[-4000:]
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Served:
    """What an engine answered, in each round, or why it refused the model.

    ``likeliest`` has, where they were asked for, the likeliest tokens in the place of each of an answer's, with the
    logarithms of their probabilities; ``cached`` how many tokens of each prompt the last round read from the cache.
    """

    answers: list[Tokens]
    refused: str = ""
    likeliest: list[list[list[dict[int, float]]]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The last line of a refusal."""
        return self.refused.strip().rpartition("\n")[2]


class VLLM:
    """A process that serves one checkpoint after another.

    Args:
        scratch: where it keeps the code of checkpoints and compiled graphs, and writes its log.
        plugin: whether it has the plugin for edited checkpoints.
        runner: which of vLLM's model runners it has; the one that vLLM takes if ``None``.
    """

    def __init__(self, scratch: Path, *, plugin: bool = False, runner: Runner | None = None) -> None:
        places = {"HF_MODULES_CACHE": str(scratch / "modules"), "VLLM_CACHE_ROOT": str(scratch / "vllm")}
        if runner is not None:
            places["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "second"))
        places["VLLM_PLUGINS"] = "wise" if plugin else ""
        with (scratch / "vllm.log").open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [_PYTHON, str(_SUPPORT / "vllm_answers.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**_own_environment(), **places},
            )
        self._log = scratch / "vllm.log"

    def ask(
        self,
        model: Path,
        prompts: Sequence[Sequence[int]],
        *,
        tokens: int = 8,
        rounds: int = 1,
        asking: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Served:
        """What a checkpoint answers, with these settings of vLLM's ``LLM``.

        Args:
            asking: how it is asked besides; see ``vllm_answers.py``.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        given = {"model": str(model), "prompts": list(prompts), "tokens": tokens, "rounds": rounds}
        stdin.write(json.dumps({**given, **(asking or {}), "settings": settings}) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, self._log.read_text(encoding="utf-8")[-4000:]
        told = json.loads(line)
        likeliest = [
            [[{int(token): one for token, one in place.items()} for place in answer] for answer in answers]
            for answers in told.get("likeliest", [])
        ]
        return Served(told.get("answers", []), told.get("refused", ""), likeliest, told.get("cached", []))

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@torch.no_grad()
def in_transformers(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, tokens: int = 8) -> Tokens:
    """Greedy answers of that many tokens, each prompt by itself."""
    return [_greedily(model, prompt, tokens)[0, len(prompt) :].tolist() for prompt in prompts]


def logits_in_transformers(model: PreTrainedModel, prompt: Sequence[int], *, tokens: int) -> torch.Tensor:
    """Logits (tokens, v) in the places of a greedy answer's tokens."""
    output = _greedily(model, prompt, tokens, output_logits=True, return_dict_in_generate=True)
    return torch.cat(output.logits).float()


def _greedily(model: PreTrainedModel, prompt: Sequence[int], tokens: int, **asked: bool) -> Any:
    """What ``generate()`` returns for a greedy answer of that many tokens, whatever ends it."""
    ids = torch.tensor([list(prompt)])
    settled = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settled, **asked)


@torch.no_grad()
def chosen_by(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """The likeliest token in the place of each of an answer, given those before it: the answer, if it is greedy."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    found: list[int] = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    return found


def wider(architecture: str) -> PretrainedConfig:
    """A tiny model's settings, with heads as wide as an engine's attention asks for."""
    config = copy.deepcopy(TINY_CONFIGS[architecture])
    text = config.get_text_config()
    for name in ("hidden_size", "n_embd"):
        if name in text.to_dict():
            setattr(text, name, 4 * _HEAD)
    for name in ("head_dim", "query_pre_attn_scalar"):
        if text.to_dict().get(name) is not None:
            setattr(text, name, _HEAD)
    if architecture == "gptj":
        text.rotary_dim = _HEAD // 2
    if architecture == "gpt_neox":  # it shares no keys, whatever is said, and vLLM would believe it
        text.num_key_value_heads = text.num_attention_heads
    if architecture.startswith("gemma"):  # as wide as this, a tied model repeats its last token whatever is added
        text.tie_word_embeddings = False
    return config
