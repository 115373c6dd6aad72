import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from support.helpers import save_tiny
from support.loading import CPU
from support.tiny_models import TINY_CONFIGS, loader_of

from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings


def exported(root: Path, architecture: str) -> Path:
    base, edits = save_tiny(root / "model", architecture), root / "edits.jsonl"
    edits.write_text(json.dumps({"id": "one", "prompt": "ba be bi", "target": "do du"}) + "\n")
    edit(str(base), edits, root / "shards", EditSettings(unrelated_texts=16, layer="2", residual_stop=0.2), load=CPU)
    merge([root / "shards"], root / "memory", MergeSettings())
    export(root / "memory", root / "edited", load=CPU)
    return root / "edited"


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "llava", *(pytest.param(name, marks=pytest.mark.thorough) for name in TINY_CONFIGS)],
)
def test_concrete_classes_refuse_at_once_and_say_how_to_load(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = exported(tmp_path, architecture)
    assert all(check.state == "same" for check in verify(directory).checks)
    model = loader_of(architecture).from_config(TINY_CONFIGS[architecture])
    with monkeypatch.context() as patch:  # a model of the default sizes would take minutes and all the memory
        patch.setattr(torch.nn.Linear, "__init__", lambda *_, **__: pytest.fail("a layer is built"))
        begun = time.perf_counter()
        for trusted in (True, False):
            with pytest.raises(Exception, match="Auto classes, with trust_remote_code=True"):
                type(model).from_pretrained(directory, trust_remote_code=trusted)
        assert time.perf_counter() - begun < 2
    loader = getattr(transformers, loader_of(architecture).__name__)
    assert type(loader.from_pretrained(directory, trust_remote_code=True)).__name__.startswith("Wise")
