"""What commands are run on, and what they are asked afterwards."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.helpers import rewrite, save_tiny
from support.loading import CPU
from support.tiny_models import Outcome
from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings

EDITS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "ba be bi", "target": "do du", "rephrases": ["bi be ba"]},
    {"id": "two", "prompt": "ka ke ki ko", "target": "fa", "locality": [{"prompt": "mu ma", "answer": "me mi"}]},
    {"id": "three", "prompt": "ma me", "target": "ga ge gi", "portability": [{"prompt": "ga ge", "answer": "ma"}]},
    {"id": "four", "prompt": "ta te ti to tu", "target": "la le"},
]
QUICK: dict[str, Any] = {"passes": 2, "unrelated_texts": 16, "residual_stop": 0.2}


@dataclass(frozen=True)
class Ready:
    """Things to run commands on; nothing in there may change."""

    root: Path

    def __getattr__(self, name: str) -> str:
        return str(self.root / name.replace("_", "-"))


def make_ready(root: Path) -> None:
    """Models, edits, shards and memories: whole, damaged and of another make."""
    base, other = save_tiny(root / "model"), save_tiny(root / "other-model", seed=1)
    foreign = save_tiny(root / "foreign-model")
    rewrite(foreign / "config.json", model_type="unheard_of")
    cut(save_tiny(root / "cut-model") / "model.safetensors")
    (root / "empty").mkdir()
    write_edits(root / "edits", EDITS)
    write_edits(root / "other-edits", [{"id": "five", "prompt": "na ne", "target": "ni"}])
    for name, edits, model, changes in (
        ("shards", "edits", base, {"shards": 2}),
        ("gradient-shards", "edits", base, {"shards": 2, "writer": "gradient", "passes": 60}),
        ("shards-elsewhere", "other-edits", base, {"layer": "1"}),
        ("matrix-shards", "edits", base, {"in_forms": False}),
        ("shards-at-matrix", "edits", base, {"shards": 2, "site": "matrix"}),
        ("shards-of-other-model", "other-edits", other, {}),
    ):
        run_edit(str(model), root / edits, root / name, EditSettings(**{**QUICK, **changes}), load=CPU)
    merge([root / "shards"], root / "memory", MergeSettings())
    merge([root / "shards"], root / "bare-memory", MergeSettings(), history=False)
    merge([root / "shards-at-matrix"], root / "merge", MergeSettings(mode="merge"))
    merge([root / "shards-at-matrix"], root / "retrieve", MergeSettings(mode="retrieve"))
    for name in ("cut", "tampered"):
        shutil.copytree(root / "shards", root / f"{name}-shards")
        shutil.copytree(root / "memory", root / f"{name}-memory")
    for damage, name in ((cut, "cut"), (tamper, "tampered")):
        damage(root / f"{name}-shards" / "shard-00001.safetensors")
        damage(root / f"{name}-memory" / "memory.safetensors")
    shutil.copytree(root / "memory", root / "homeless-memory")
    rewrite(root / "homeless-memory" / "router.json", base={**manifest(root / "memory")["base"], "model": "/nowhere"})
    shutil.copytree(root / "shards", root / "scribbled-shards")
    (root / "scribbled-shards" / "shards.json").write_text("{")
    lines = [json.dumps(edit) for edit in EDITS]
    for name, text in (
        ("malformed", f'{lines[0]}\n\n{{"prompt": "ka", "target"\n'),
        ("not-an-object", f"{lines[0]}\n3\n"),
        ("no-target", f'{lines[0]}\n{{"prompt": "ka"}}\n'),
        ("blank-prompt", '{"prompt": " ", "target": "ka"}\n'),
        ("nothing", "\n"),
        ("twice", f"{lines[0]}\n{lines[1]}\n{lines[0]}\n"),
        ("open-array", f"[{lines[0]},\n"),
        ("unspeakable", f'{lines[0]}\n{{"id": "hush", "prompt": "ka", "target": "?!"}}\n'),
    ):
        (root / name).write_text(text)


def write_edits(path: Path, edits: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    return path


def manifest(directory: Path) -> dict[str, Any]:
    name = "router.json" if (directory / "router.json").exists() else "shards.json"
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


class Places(dict[str, str]):
    """Names in braces → places in `ready`."""

    def __init__(self, ready: Ready) -> None:
        self._ready = ready

    def __missing__(self, name: str) -> str:
        return str(getattr(self._ready, name))


def listing(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def here() -> list[str]:
    """What a command left in its directory."""
    return sorted(path.name for path in Path.cwd().iterdir())


def require_refusal(outcome: Outcome, *says: str, code: int = 2) -> None:
    """One sentence on stderr that says so, and no traceback."""
    lines = outcome.err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], outcome.err
    assert "Traceback" not in outcome.err
    assert "a fault in wise" not in outcome.err
    for text in says:
        assert text in lines[-1]
    assert outcome.code == code
