"""Write docs/compatibility.md: what every type of causal language model was put through, as a tiny random model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wisecli.config import LoadOptions

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from support.every_type import model_types, save_type, unlike_decoders  # noqa: E402
from support.helpers import save_tiny  # noqa: E402
from support.tiny_models import TINY_CONFIGS, VARIANTS, loader_of  # noqa: E402

from wisecli.commands.checkpoint.export import export  # noqa: E402
from wisecli.commands.edit.edit import edit  # noqa: E402
from wisecli.commands.memory.merge import merge  # noqa: E402
from wisecli.config import EditSettings, MergeSettings  # noqa: E402
from wisecli.errors import WiseError  # noqa: E402

DONE = "✓"
STEPS = ("edit", "merge", "export")
CHECKS = (*STEPS, "reload without wisecli", "right", "unrelated", "batch = single")
UNTAKEN, LIMIT = "untaken", 300
EDITS = (("ba be bi", "do du"), ("ka ke ki ko", "fa"), ("ma me", "ga ge gi"))
PROMPTS = (*(prompt for prompt, _ in EDITS), "so su sa", "ti", "lo la le li lu")

# Loads every export, and its base, as somebody does who has transformers only; prints what came out of each as JSON.
ALONE = """
import json, sys
sys.modules["wisecli"] = None
import torch
import transformers

exports, prompts, targets = json.loads(sys.argv[1])
said = {name: {} for name in exports}


def check(name, what, run):
    if all(one == "✓" for one in said[name].values()):
        try:
            said[name][what] = run() or "✓"
        except Exception as error:
            said[name][what] = f"{type(error).__name__}: {error}".splitlines()[0]


for name, (path, base, loader) in exports.items():
    kept = {}

    def load(place):
        return getattr(transformers, loader).from_pretrained(place, trust_remote_code=True).eval()

    def reload():
        kept["tokenizer"] = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=True, padding_side="left"
        )
        kept["tokenizer"].pad_token = kept["tokenizer"].eos_token
        kept["edited"], kept["base"] = load(path), load(base)

    def answers(which, size):
        texts = []
        for first in range(0, len(prompts), size):
            batch = kept["tokenizer"](prompts[first : first + size], return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            output = kept[which].generate(**batch, max_new_tokens=12, do_sample=False)
            texts += kept["tokenizer"].batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return texts

    def right():
        kept["single"] = answers("edited", 1)
        pairs = zip((one.replace(" ", "") for one in kept["single"]), targets)
        good = sum(text.startswith(target.replace(" ", "")) for text, target in pairs)
        return None if good == len(targets) else f"{good} of {len(targets)}"

    def unrelated():
        kept["plain"] = answers("base", 1)
        others = list(zip(kept["single"], kept["plain"]))[len(targets) :]
        same = sum(one == other for one, other in others)
        return None if same == len(others) else f"{same} of {len(others)}"

    def batched():
        if answers("edited", len(prompts)) == kept["single"] or answers("base", len(prompts)) != kept["plain"]:
            return None
        return "a padded batch answers otherwise, and the base's does not"

    check(name, "reload without wisecli", reload)
    check(name, "right", right)
    check(name, "unrelated", unrelated)
    check(name, "batch = single", batched)
print(json.dumps(said))
"""


def table(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What came of each check, for each type or form of one; checks after a failed one are not made."""
    with tempfile.TemporaryDirectory() as scratch:
        results: dict[str, dict[str, str]] = {}
        exports: dict[str, tuple[str, str, str]] = {}
        for name in names:
            root = Path(scratch) / name.replace(", ", "-")
            results[name] = _chain(name, root)
            if "export" in results[name] and results[name]["export"] == DONE:
                exports[name] = str(root / "edited"), str(root / "model"), _loader(name)
            sys.stderr.write(f"{name} {results[name]}\n")
        for name, said in _alone(exports, Path(scratch)).items():
            results[name] |= said
    return results


def tried(left_out: Iterable[str]) -> list[str]:
    """All types and forms of some but those that are left out."""
    types = {name for name in model_types() if name not in set(left_out)}
    return [*sorted({*types, *TINY_CONFIGS}), *sorted(VARIANTS)]


def _loader(name: str) -> str:
    return str(loader_of(name).__name__) if name in TINY_CONFIGS | VARIANTS else "AutoModelForCausalLM"


def _chain(name: str, root: Path) -> dict[str, str]:
    base, shards, memory = root / "model", root / "shards", root / "memory"
    try:
        (save_tiny if name in TINY_CONFIGS | VARIANTS else save_type)(base, name)
    except Exception as error:  # of settings that are not its own, as its weights are drawn
        return {STEPS[0]: f"not tried, as no tiny model can be drawn ({type(error).__name__})"}
    lines = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in EDITS]
    (root / "edits.jsonl").write_text("\n".join(lines))
    settings = EditSettings(unrelated_texts=64)
    runs: dict[str, Callable[[], object]] = {
        "edit": lambda: edit(str(base), root / "edits.jsonl", shards, settings, load=LoadOptions(device="cpu")),
        "merge": lambda: merge([shards], memory, MergeSettings()),
        "export": lambda: export(memory, root / "edited"),
    }
    outcomes = {}
    for step in STEPS:
        try:
            with _limited():
                untaken = getattr(runs[step](), "untaken", ())
            if untaken:
                outcomes[UNTAKEN] = str(len(untaken))
        except WiseError as error:
            outcomes[step] = str(error).replace(str(base), "it").splitlines()[0]
            break
        except Exception as error:  # whatever it is, it is the table's to say
            outcomes[step] = f"{type(error).__name__}: {error}".splitlines()[0]
            break
        outcomes[step] = DONE
    return outcomes


@contextmanager
def _limited() -> Iterator[None]:
    """Within, what takes longer than a few minutes is stopped."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _alone(exports: dict[str, tuple[str, str, str]], scratch: Path) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(scratch / "modules")
    command = [sys.executable, "-I", "-c", ALONE, json.dumps([exports, PROMPTS, [target for _, target in EDITS]])]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=True)  # nosec B603 # this Python
    said: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return said


def passed(result: dict[str, str]) -> bool:
    """Whether a type passed every check."""
    return all(result.get(check) == DONE for check in CHECKS)


def page(results: dict[str, dict[str, str]], unbuilt: dict[str, str]) -> str:
    """The whole page.

    Args:
        unbuilt: types that were not tried, and why.
    """
    good = [name for name, one in results.items() if passed(one)]
    others = [f"| {name} | {_stopped(one)} |" for name, one in results.items() if name not in good]
    reasons: dict[str, list[str]] = {}
    for name, why in unbuilt.items():
        reasons.setdefault(why, []).append(name)
    left = [f"| {', '.join(names)} | {why} |" for why, names in reasons.items()]
    return (
        "# Compatibility\n\nThis page is written by `scripts/compatibility.py`. Every type of causal language model\n"
        "that the installed transformers has is tried as a tiny, randomly drawn model: facts are edited, merged into\n"
        "a lookup and exported. The export is loaded by transformers alone, in a process in which `wisecli` cannot be\n"
        "imported. *Right*: every edit's prompt is answered by its target. *Unrelated*: other prompts are answered as\n"
        "by the base. *Batch = single*: each row of a padded batch gives what its prompt gives alone, if the base's\n"
        "does. Edits are added to the states that leave a decoder layer.\n\n"
        f"The checks are: {', '.join(CHECKS)}. {len(good)} of {len(results)} pass every one.\n\n"
        "## Edited\n\n" + _listed(good) + "\n\n"
        "LLaVA and Qwen2-VL, which read images, are tried with text here; the tests put images before it.\n\n"
        "## Refused, or not right\n\n| type | what came of it |\n|---|---|\n" + "\n".join(others) + "\n\n"
        "## Not tried\n\n| types | why |\n|---|---|\n" + "\n".join(left) + "\n"
    )


def _listed(names: list[str]) -> str:
    """Names of types and of forms, which have commas in them."""
    return textwrap.fill("; ".join(names), 120, break_long_words=False, break_on_hyphens=False)


def _stopped(result: dict[str, str]) -> str:
    """The first check that failed, and how."""
    said = next(f"{check}: {result[check]}" for check in CHECKS if result.get(check, DONE) != DONE)
    untaken = f", as `wise edit` says: {result[UNTAKEN]} did not take" if UNTAKEN in result else ""
    return said.replace("`", "") + untaken


if __name__ == "__main__":
    torch.set_num_threads(1)
    left_out = unlike_decoders()
    found = table(tried(left_out))
    PAGE.write_text(page(found, left_out), encoding="utf-8")
