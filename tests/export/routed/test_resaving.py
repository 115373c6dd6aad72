"""What `save_pretrained` of an exported model writes is an exported model again, for `wise` too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.loading import CPU
from support.places import EDITS, change, copied, make_places, reseal
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.artifacts.checksums import CHECKSUMS, SIGNATURE_NAMES, read_checksums
from wisecli.artifacts.memory_manifest import read_manifest, read_memory
from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.generate import generate
from wisecli.commands.checkpoint.inspect import inspect
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.measure.evaluate import evaluate
from wisecli.commands.memory.diff import diff
from wisecli.config import EvalSettings
from wisecli.errors import OutputExistsError
from wisecli.io.digest import sha256_file

SIDE = "model-side-memory.safetensors"
PROMPTS = [str(edit["prompt"]) for edit in EDITS]
PIECES = "20KB"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_places(tmp_path_factory.mktemp("resaving"))


def load(path: Path, kind: Any = AutoModelForCausalLM, **named: Any) -> PreTrainedModel:
    return kind.from_pretrained(path, trust_remote_code=True, **named).eval()


def saved(path: Path, target: Path, **named: Any) -> Path:
    """A checkpoint that is loaded and saved again."""
    load(path).save_pretrained(target, **named)
    AutoTokenizer.from_pretrained(path).save_pretrained(target)
    return target


def logits(path: Path) -> torch.Tensor:
    batch = AutoTokenizer.from_pretrained(path)(PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        return load(path)(input_ids=batch["input_ids"]).logits


def measured(path: Path) -> dict[str, float]:
    return evaluate(path, EvalSettings(generate=False), load=CPU).after


@pytest.mark.parametrize("pieces", [None, PIECES])
def test_what_is_saved_again_is_known_to_every_command(root: Path, tmp_path: Path, pieces: str | None) -> None:
    before = root / "edited"
    again = saved(before, tmp_path / "again", **({"max_shard_size": pieces} if pieces else {}))
    assert len(list(again.glob("model*.safetensors"))) > (3 if pieces else 1)
    assert (again / "model-base.safetensors").exists() == (pieces is None)
    report = verify(again, model=str(root / "model"))
    assert report.kind == "exported"
    assert report.differences == ()
    assert {check.file for check in report.checks if check.state == "unchecked"} <= {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert inspect(again).edits == inspect(before).edits
    assert measured(again) == pytest.approx(measured(before), abs=1e-4)
    assert [one.text for one in generate(again, PROMPTS, load=CPU)] == [
        one.text for one in generate(before, PROMPTS, load=CPU)
    ]
    assert not (compared := diff(str(before), str(again))).added + compared.removed
    torch.testing.assert_close(logits(again), logits(before), rtol=0, atol=1e-5)


def test_the_memory_and_its_manifest_come_along_to_the_byte(root: Path, tmp_path: Path) -> None:
    again = saved(root / "edited", tmp_path / "again")
    first, second = read_memory(root / "edited"), read_memory(again)
    assert first.edits == second.edits
    assert first.memory.describe() == second.memory.describe()
    tensors, others = load_file(root / "edited" / SIDE), load_file(again / SIDE)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    digests = read_manifest(again).sha256
    assert digests[SIDE] == sha256_file(again / SIDE)
    assert {"modeling_wise.py", "resaving.py", "config.json", "model.safetensors.index.json"} <= digests.keys()
    assert read_checksums(again)["router.json"] == sha256_file(again / "router.json")


def test_of_a_halved_model_the_manifest_describes_what_was_written(root: Path, tmp_path: Path) -> None:
    model = load(root / "edited", dtype=torch.bfloat16).bfloat16()
    model.save_pretrained(tmp_path / "half")
    report = verify(tmp_path / "half")
    assert report.differences == ()
    assert read_manifest(tmp_path / "half").base.matrix != read_manifest(root / "edited").base.matrix
    assert load(tmp_path / "half").dtype == torch.bfloat16


def test_a_model_is_saved_over_itself_in_pieces_and_whole_again(root: Path, tmp_path: Path) -> None:
    path, before = copied(root, "edited", tmp_path), logits(root / "edited")
    (path / SIGNATURE_NAMES[0]).write_text("of the former list")
    for named in ({"max_shard_size": PIECES}, {}, {"max_shard_size": PIECES}):
        load(path).save_pretrained(path, **named)
        assert verify(path).differences == ()
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        assert {file.name for file in path.glob("*.safetensors")} == set(index.values())
        torch.testing.assert_close(logits(path), before, rtol=0, atol=1e-5)
    assert not (path / SIGNATURE_NAMES[0]).exists()


def test_a_former_stock_model_in_the_place_is_not_read_instead(root: Path, tmp_path: Path) -> None:
    path = copied(root, "model", tmp_path)
    assert (path / "model.safetensors").exists()
    load(root / "edited").save_pretrained(path, max_shard_size=PIECES)
    assert verify(path).differences == ()
    torch.testing.assert_close(logits(path), logits(root / "edited"), rtol=0, atol=1e-5)


def test_damage_to_it_is_found(root: Path, tmp_path: Path) -> None:
    again = saved(root / "edited", tmp_path / "again")
    content = bytearray((again / SIDE).read_bytes())
    content[-3] ^= 1
    (again / SIDE).write_bytes(content)
    assert {check.file for check in verify(again).differences} == {SIDE}


def test_an_export_to_its_place_says_that_something_else_is_there(root: Path, tmp_path: Path) -> None:
    again = saved(root / "edited", tmp_path / "again")
    with pytest.raises(OutputExistsError, match="written by 'save_pretrained'"):
        export(root / "memory", again, load=CPU)
    assert export(root / "memory", again, load=CPU, force=True).edits == len(EDITS)


def test_what_has_no_manifest_or_no_head_is_saved_as_any_model(root: Path, tmp_path: Path) -> None:
    path = copied(root, "edited", tmp_path)
    (path / "router.json").unlink()
    load(path).save_pretrained(tmp_path / "plain")
    load(root / "edited", AutoModel).save_pretrained(tmp_path / "headless")
    for name in ("plain", "headless"):
        assert not (tmp_path / name / "router.json").exists()
        assert not (tmp_path / name / CHECKSUMS).exists()
    load(tmp_path / "plain")


def test_the_model_that_was_saved_goes_on_answering(root: Path, tmp_path: Path) -> None:
    model = load(root / "edited")
    batch = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=batch).logits
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(model(input_ids=batch).logits, before)
    model.save_pretrained(tmp_path / "once more")
    assert verify(tmp_path / "once more").differences == ()


def test_the_manifest_that_was_loaded_is_written_whatever_became_of_it(root: Path, tmp_path: Path) -> None:
    path = copied(root, "edited", tmp_path)
    model = load(path)
    change(path / "router.json", lambda content: content["edits"].clear())
    reseal(path)
    model.save_pretrained(tmp_path / "again")
    assert len(read_manifest(tmp_path / "again").edits) == len(EDITS)


def test_what_goes_to_the_hub_is_saved_in_the_same_way(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda _model, name, **named: sent.append((name, named)))
    model = load(root / "edited")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="some/one", max_shard_size=PIECES)
    assert sent == [("mine", {"private": True}), ("some/one", {"max_shard_size": PIECES})]
    assert verify(tmp_path / "mine").differences == ()


def test_a_trained_model_keeps_its_memory_and_says_which_layer_it_stands_by(root: Path, tmp_path: Path) -> None:
    model = load(root / "edited")
    with torch.no_grad():
        model.get_submodule("model.layers.3.mlp.down_proj").weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained", state_dict=model.state_dict())
    assert verify(tmp_path / "trained").differences == ()
    layer = "model.layers.3"
    assert [check.tensor for check in verify(tmp_path / "trained", model=str(root / "model")).differences] == [layer]
