"""vLLM's server of an edited checkpoint: streamed answers, and another release in the place of the one it serves."""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from support.loading import CPU
from support.served import EDITS, PROMPTS, in_transformers, openai_server, serving, tiny_export
from transformers import AutoModelForCausalLM, AutoTokenizer

from wisecli.commands.checkpoint.export import export
from wisecli.commands.edit.edit import edit
from wisecli.commands.measure.check import check
from wisecli.commands.measure.openai_server import Server
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings

pytestmark = serving

OPTIONS = ("--enforce-eager", "--max-model-len", "64", "--dtype", "float32", "--max-num-seqs", "8")
TOKENS = 8


def asked(url: str, model: Path, prompt: list[int], *, stream: bool) -> str:
    """What a server completes a prompt with."""
    content = {"model": str(model), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body = json.dumps(content | {"stream": stream}).encode()
    with urlopen(Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"}), timeout=300) as reply:
        said = reply.read().decode()
    lines = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
    parts: list[Any] = [json.loads(line) for line in lines] if stream else [json.loads(said)]
    assert len(parts) > 1 or not stream
    return "".join(part["choices"][0]["text"] for part in parts)


def replace(root: Path) -> Path:
    """Put a release with other targets in the place of an exported one; its edits."""
    targets = [target for _, target in EDITS]
    lines = [
        json.dumps({"prompt": prompt, "target": target})
        for (prompt, _), target in zip(EDITS, (*targets[1:], targets[0]), strict=True)
    ]
    (root / "other.jsonl").write_text("\n".join(lines))
    settings = EditSettings(unrelated_texts=64, layer="2")
    edit(str(root / "model"), root / "other.jsonl", root / "other", settings, load=CPU)
    merge([root / "other"], root / "memory-of-others", MergeSettings())
    export(root / "memory-of-others", root / "edited", load=CPU, force=True)
    return root / "other.jsonl"


def held(url: str, edits: Path) -> int:
    """How many edits hold as text."""
    counts = {name: there for name, _, there in check(Server(url, timeout=300), edits, contained=True).counts()}
    return counts["edits by completions"]


@pytest.mark.parametrize(
    "processes", [(), ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")], ids=["one", "two"]
)
def test_answers_are_streamed_and_the_next_release_answers(tmp_path: Path, processes: tuple[str, ...]) -> None:
    path = tiny_export(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    wanted = [
        tokenizer.decode(answer, skip_special_tokens=True) for answer in in_transformers(model, prompts, tokens=TOKENS)
    ]
    with openai_server(path, tmp_path / "server.log", *OPTIONS, *processes) as url:
        whole = [asked(url, path, prompt, stream=False) for prompt in prompts]
        assert [text.split() for text in whole] == [text.split() for text in wanted]
        assert [asked(url, path, prompt, stream=True) for prompt in prompts] == whole
        assert held(url, tmp_path / "edits.jsonl") == len(EDITS)
        others = replace(tmp_path)
        assert held(url, others) == len(EDITS)
        assert held(url, tmp_path / "edits.jsonl") == 0
