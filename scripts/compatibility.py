"""Write docs/compatibility.md: what each architecture of the table was put through, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from wisecli.config import LoadOptions

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from support.helpers import save_tiny  # noqa: E402
from support.tiny_models import TINY_CONFIGS, VARIANTS, loader_of  # noqa: E402

from wisecli.commands.edit import edit  # noqa: E402
from wisecli.commands.export import export  # noqa: E402
from wisecli.commands.merge import merge  # noqa: E402
from wisecli.config import EditSettings, MergeSettings  # noqa: E402

DONE = "✓"
STEPS = ("edit", "merge", "export")
CHECKS = (*STEPS, "reload without wisecli", "edits open", "generate", "batch = single")
EDITS = (("ba be bi", "do du"), ("ka ke ki ko", "fa"), ("ma me", "ga ge gi"))
PROMPTS = (*(prompt for prompt, _ in EDITS), "so su sa", "ti", "lo la le li lu")

# Loads every export as somebody does who has transformers only; prints what came out of each as JSON.
ALONE = """
import json, sys
sys.modules["wisecli"] = None
import torch
import transformers

exports, prompts, edits = json.loads(sys.argv[1])
said = {name: {} for name in exports}


def check(name, what, run):
    if all(one == "✓" for one in said[name].values()):
        try:
            said[name][what] = run() or "✓"
        except Exception as error:
            said[name][what] = f"{type(error).__name__}: {error}".splitlines()[0]


for name, (path, loader) in exports.items():
    kept = {}

    def reload():
        kept["tokenizer"] = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=True, padding_side="left"
        )
        kept["tokenizer"].pad_token = kept["tokenizer"].eos_token
        kept["model"] = getattr(transformers, loader).from_pretrained(path, trust_remote_code=True).eval()

    def opened():
        model = kept["model"]
        routed = model.get_submodule(model.config.wise["module"])
        for prompt in prompts[:edits]:
            batch = kept["tokenizer"](prompt, return_tensors="pt")
            with torch.no_grad():
                edited = model(**batch).logits[0, -1]
                with routed.called_with(off=True):
                    plain = model(**batch).logits[0, -1]
            if torch.equal(edited, plain):
                return f"{prompt!r} is answered by the main memory"

    def answers(size):
        texts = []
        for first in range(0, len(prompts), size):
            batch = kept["tokenizer"](prompts[first : first + size], return_tensors="pt", padding=True)
            output = kept["model"].generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
            texts += output[:, batch.input_ids.shape[1] :].tolist()
        return texts

    def generate():
        kept["single"] = answers(1)

    def batched():
        return None if answers(len(prompts)) == kept["single"] else "a padded batch answers otherwise"

    check(name, "reload without wisecli", reload)
    check(name, "edits open", opened)
    check(name, "generate", generate)
    check(name, "batch = single", batched)
print(json.dumps(said))
"""


def table(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What came of each check, for each architecture or form of one; checks after a failed one are not made."""
    with tempfile.TemporaryDirectory() as scratch:
        results: dict[str, dict[str, str]] = {}
        exports: dict[str, tuple[str, str]] = {}
        for name in names:
            root = Path(scratch) / name.replace(", ", "-")
            results[name] = _chain(name, root)
            if all(outcome == DONE for outcome in results[name].values()):
                exports[name] = str(root / "edited"), loader_of(name).__name__
        for name, said in _alone(exports, Path(scratch)).items():
            results[name] |= said
    return results


def _chain(name: str, root: Path) -> dict[str, str]:
    base, shards, memory = root / "model", root / "shards", root / "memory"
    save_tiny(base, name)
    lines = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in EDITS]
    (root / "edits.jsonl").write_text("\n".join(lines))
    settings = EditSettings(unrelated_texts=64, layer="2")
    runs: dict[str, Callable[[], object]] = {
        "edit": lambda: edit(str(base), root / "edits.jsonl", shards, settings, load=LoadOptions(device="cpu")),
        "merge": lambda: merge([shards], memory, MergeSettings()),
        "export": lambda: export(memory, root / "edited"),
    }
    outcomes = {}
    for step in STEPS:
        try:
            runs[step]()
        except Exception as error:  # whatever it is, it is the table's to say
            outcomes[step] = f"{type(error).__name__}: {error}".splitlines()[0]
            break
        outcomes[step] = DONE
    return outcomes


def _alone(exports: dict[str, tuple[str, str]], scratch: Path) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(scratch / "modules")
    command = [sys.executable, "-I", "-c", ALONE, json.dumps([exports, PROMPTS, len(EDITS)])]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=True)  # nosec B603 # this Python
    said: dict[str, dict[str, str]] = json.loads(done.stdout)
    return said


def page(results: dict[str, dict[str, str]]) -> str:
    """The whole page."""
    head = "| architecture | " + " | ".join(CHECKS) + " |\n|---" + "|:-:" * len(CHECKS) + "|\n"
    rows = [
        f"| {name} | " + " | ".join(one.get(check, "–") for check in CHECKS) + " |" for name, one in results.items()
    ]
    return (
        "# Compatibility\n\nThis page is written by `scripts/compatibility.py`. Each architecture of\n"
        "`wisecli/models/architectures.toml`, and some in further forms, is tried as a tiny, randomly drawn model.\n"
        "Facts are edited, merged into a lookup and exported. The export is loaded by transformers alone, in a\n"
        "process in which `wisecli` cannot be imported. Every edit's prompt opens the memory, the model generates,\n"
        "and each row of a padded batch gives what its prompt gives alone.\n\n" + head + "\n".join(rows) + "\n\n"
        "LLaVA and Qwen2-VL, which read images, are tried with text here; the tests put images before it.\n\n"
        "The value matrix of any other dense decoder is read off its module tree, or named by `--target-module`.\n"
        "Mixtures of experts and quantised models are refused.\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(table([*sorted(TINY_CONFIGS), *sorted(VARIANTS)])), encoding="utf-8")
