"""Memories, shards and a routed checkpoint as an older version wrote them, in `memory_v1`, with what it made of them.

They are of a tiny model with random weights: four edits by a lookup with a history, in one matrix, and one matrix that
the norm opens. ``expected.json`` has what that version decided and answered.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.wise import whitened_keys
from support.helpers import save_tiny
from support.loading import CPU
from support.sharing import Share
from support.tiny_models import Wise
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from wisecli.artifacts.memory_manifest import read_memory
from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.memory.merge import merge
from wisecli.config import MergeSettings
from wisecli.errors import DamagedFileError
from wisecli.evaluation.edited_model import EditedModel, attach
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.models.running.generation import generate
from wisecli.routing.deciding.question_words import ASKED_BY
from wisecli.vllm_plugin.releases import made_for, read_release
from wisecli.vllm_plugin.served_memory import Edited, described_memory

STORED = Path(__file__).parent / "memory_v1"
EXPECTED: dict[str, dict[str, dict[str, Any]]] = json.loads((STORED / "expected.json").read_text())


@pytest.fixture(scope="module")
def model(share: Share) -> Path:
    """The base model of all that is stored; its seed says which weights it has."""

    def make(root: Path) -> None:
        save_tiny(root / "model", config=LlamaConfig(**json.loads((STORED / "model_config.json").read_text())))
        shutil.copyfile(STORED / "model_config.json", root / "model" / "config.json")

    return share("base of stored memories", make) / "model"


def answer_of(edited: EditedModel, prompt: str) -> str:
    (tokens,) = generate(edited.model, edited.tokenizer, [prompt], max_new_tokens=4, batch_size=1)
    return str(edited.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stored_memory_decides_and_answers_as_it_did(model: Path, name: str) -> None:
    edited = attach(STORED / name, model=str(model), load=CPU)
    for prompt, expected in EXPECTED[name].items():
        decision = edited.decide(collate([Row(tuple(edited.tokenizer(prompt)["input_ids"]), (2,))]))
        assert (int(decision.memory), int(decision.nearest)) == (expected["memory"], expected["nearest"]), prompt
        assert float(decision.score_ratio) == pytest.approx(expected["score_ratio"], rel=1e-4)
        assert decision.scores[0].tolist() == pytest.approx(expected["scores"], rel=1e-3, abs=1e-5)
        if expected["ask_prob"] is not None:
            assert decision.ask_prob is not None
            assert float(decision.ask_prob) == pytest.approx(expected["ask_prob"], rel=1e-4)
            assert decision.subject_matched is not None
            assert decision.subject_matched[0].int().tolist() == expected["subject_matched"]
        assert answer_of(edited, prompt) == expected["answer"]
        with edited.unedited():
            assert answer_of(edited, prompt) == expected["unedited"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stored_memory_is_whole(model: Path, name: str) -> None:
    report = verify(STORED / name, model=str(model))
    assert [check for check in report.checks if check.state == "differs"] == []


def nearest_others(keys: torch.Tensor) -> torch.Tensor:
    """Return which other key is nearest to each (n,)."""
    units = torch.nn.functional.normalize(keys, dim=-1)
    nearest: torch.Tensor = (units @ units.T).fill_diagonal_(-1.0).argmax(1)
    return nearest


def require_thresholds(made: tuple[float, ...], stored: tuple[float, ...]) -> None:
    """Those that lie above other edits' prompts are as they were; where nothing is near, a gate lets them be lower than
    .5; that of the last edit, which names no subject, is higher.
    """
    assert stored[1] == 0.5
    assert made[:-1] == pytest.approx((stored[0], 0.3308, *stored[2:-1]), rel=1e-4)
    assert made[-1] > 1.5 * stored[-1]


@pytest.mark.parametrize(("mode", "name"), [("lookup", "lookup"), ("merge", "merge")])
def test_stored_shards_make_the_memory_that_they_made(tmp_path: Path, model: Path, mode: str, name: str) -> None:
    merge([STORED / "lookup/history/shards/0001"], tmp_path / "memory", MergeSettings(mode=mode), model=str(model))
    made, stored = read_memory(tmp_path / "memory").memory, read_memory(STORED / name).memory
    require_thresholds(made.thresholds, stored.thresholds)
    tensors, expected = dict(made.tensors), dict(stored.tensors)
    if name == "lookup":
        units, keys = tensors["key_scales"][:, None], (whitened_keys(tensors), whitened_keys(expected))
        assert bool(((keys[0] - keys[1]).abs() <= units / 2 + 1e-3).all())
        assert torch.equal(*map(nearest_others, keys))
        del tensors["whitened_keys"], tensors["key_scales"], expected["whitened_keys"]
    assert tensors.keys() - expected.keys() == {ASKED_BY}  # which older memories lack
    for tensor, value in expected.items():
        assert torch.allclose(tensors[tensor].float(), value.float(), rtol=1e-3, atol=1e-3), tensor


def test_a_stored_memory_goes_on(wise: Wise, model: Path) -> None:
    shutil.copytree(STORED / "lookup", "memory")
    assert wise("remove", "memory", "two", "--model", str(model)).code == 0
    assert wise("rollback", "memory", "--to", "1", "--model", str(model)).code == 0
    assert wise("log", "memory").code == 0
    made, stored = read_memory(Path("memory")).memory, read_memory(STORED / "lookup").memory
    require_thresholds(made.thresholds, stored.thresholds)


def test_a_stored_memory_is_exported(tmp_path: Path, model: Path) -> None:
    export(STORED / "lookup", tmp_path / "routed", model=str(model), weights=WeightFiles(link=False))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "routed")
    for prompt, expected in EXPECTED["lookup"].items():
        (tokens,) = generate(exported, tokenizer, [prompt], max_new_tokens=4, batch_size=1)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == expected["answer"]


def test_a_stored_checkpoint_is_read(model: Path) -> None:
    manifest, stored = read_memory(STORED / "routed"), read_memory(STORED / "lookup").memory
    assert manifest.memory.thresholds == stored.thresholds
    assert all(torch.equal(manifest.memory.tensors[name], value) for name, value in stored.tensors.items())


def test_a_stored_checkpoint_is_served(tmp_path: Path) -> None:
    shutil.copytree(STORED / "routed", tmp_path / "routed")
    tensors = read_memory(STORED / "routed").memory.tensors
    wanted = made_for(STORED / "routed")
    assert wanted is not None
    described, served = read_release(tmp_path / "routed", wanted)
    memory = described_memory(described["memory"], served, torch.device("cpu"))
    for name, value in memory.state_dict().items():
        assert torch.equal(value, tensors[name].to(value.dtype)), name


def test_a_stored_checkpoint_says_how_it_is_served() -> None:
    edited = Edited.of(json.loads((STORED / "routed/config.json").read_text())["wise"])
    assert (edited.module, edited.behind, edited.read) == ("model.layers.2.mlp.down_proj", False, (0,))
    assert (edited.marks.opener_token_ids, edited.marks.special_token_ids) == ((), (1,))


@pytest.mark.parametrize("changes", [{"router": "key"}, {"routing": "token"}, {"sharpness": 30.0}])
def test_a_stored_memory_that_opens_as_there_is_no_more_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    content = json.loads((STORED / "lookup/router.json").read_text())
    content["memory"] |= changes
    (tmp_path / "router.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFileError, match=r"which there is no more: run `wise merge` on its shards"):
        read_memory(tmp_path)
