import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import save_tiny
from support.places import PLACES, change, copied, make_places, reseal
from typer.testing import CliRunner

from wisecli.artifacts.checksums import CHECKSUMS, read_checksums
from wisecli.artifacts.integrity import Check
from wisecli.cli.app import main, program
from wisecli.commands.checkpoint.verify import verify
from wisecli.errors import GateFailedError, ModelError
from wisecli.export.routed.custom_code import former_code
from wisecli.io.digest import sha256_file

SIDE, BASE = "model-side-memory.safetensors", "model-base.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_places(tmp_path_factory.mktemp("verify"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def differing(path: Path, model: str | None = None) -> tuple[Check, ...]:
    return verify(path, model=model).differences


@pytest.mark.parametrize("place", PLACES)
def test_what_the_commands_write_is_whole(root: Path, place: str) -> None:
    report = verify(root / place)
    assert {check.state for check in report.checks} == {"same"}
    report.check()
    weights = [path.name for path in (root / place).glob("*.safetensors")]
    hashed = {check.file for check in report.checks if check.what == "sha256"}
    assert hashed >= set(weights)
    assert any("base model" in check.what for check in report.checks)


def test_an_exported_checkpoint_has_a_digest_of_every_file(root: Path) -> None:
    place = root / "edited"
    digests = json.loads((place / "router.json").read_text())["sha256"]
    expected = {path.name for path in place.iterdir()} - {"router.json", "README.md", "SHA256SUMS"}
    assert digests == {name: sha256_file(place / name) for name in expected}
    every = {*expected, "router.json", "README.md"}
    assert read_checksums(place) == {name: sha256_file(place / name) for name in every}


@pytest.mark.parametrize(
    ("place", "file"),
    [
        ("shards", "shard-00001.safetensors"),
        ("shards", "unrelated.safetensors"),
        ("memory", "memory.safetensors"),
        ("edited", SIDE),
        ("edited", BASE),
        ("edited", "tokenizer.json"),
        ("edited", "generation_config.json"),
    ],
)
@pytest.mark.parametrize("damage", ["altered", "gone", "cut"])
def test_a_file_that_differs_is_named(root: Path, tmp_path: Path, place: str, file: str, damage: str) -> None:
    path = copied(root, place, tmp_path)
    if damage == "gone":
        (path / file).unlink()
    elif damage == "cut":
        (path / file).write_bytes((path / file).read_bytes()[:-9])
    else:
        flip(path / file)
    wrong = differing(path)
    assert {check.file for check in wrong} - {str(path)} == {file}
    if damage != "gone":
        (digest,) = [check for check in wrong if check.what == "sha256"]
        assert digest.found == sha256_file(path / file)
        assert digest.expected == sha256_file(root / place / file)


def test_every_kind_of_wrong_tensor_is_named_with_what_was_expected(root: Path, tmp_path: Path) -> None:
    path = copied(root, "memory", tmp_path)
    tensors = load_file(path / "memory.safetensors")
    shape = list(tensors["residuals"].shape)
    tensors["residuals"] = torch.zeros(shape[0], shape[1] + 1, dtype=torch.float16)
    tensors["key_to_edit"] = tensors["key_to_edit"].float()
    del tensors["cosine_offset"]
    tensors["surplus"] = torch.zeros(3)
    save_file(tensors, path / "memory.safetensors")
    digest = sha256_file(path / "memory.safetensors")
    change(path / "router.json", lambda content: content["sha256"].update({"memory.safetensors": digest}))
    wrong = {check.tensor: check for check in differing(reseal(path)) if check.expected}
    assert wrong.keys() == {"residuals", "key_to_edit", "cosine_offset", "surplus"}
    listed = {check.tensor: check for check in verify(path).differences[: len(wrong)]}
    assert listed["residuals"].expected == f"float16 {shape[0]}×{shape[1]}"
    assert listed["residuals"].found == f"float16 {shape[0]}×{shape[1] + 1}"
    assert listed["key_to_edit"].found.startswith("float32")
    assert listed["cosine_offset"].found == "nothing"
    assert listed["surplus"].expected == "nothing"


def test_a_shard_that_another_sites_manifest_lists_is_named(root: Path, tmp_path: Path) -> None:
    path = copied(root, "gradient", tmp_path)  # at a matrix, whose keys have another length than its residuals
    change(path / "shards.json", lambda content: content["site"].update(d=33))
    tensors = {check.tensor for check in differing(path)}
    assert "evidence.residuals" in tensors
    assert "evidence.keys" not in tensors


def test_a_shard_whose_own_header_lists_other_edits_is_named(root: Path, tmp_path: Path) -> None:
    path = copied(root, "shards", tmp_path)

    def swap(content: dict[str, list[dict[str, object]]]) -> None:
        first, second = content["shards"]
        first["edits"], second["edits"] = second["edits"], first["edits"]

    change(path / "shards.json", swap)
    wrong = differing(path)
    assert {(check.file, check.what) for check in wrong} == {
        ("shard-00000.safetensors", "metadata edits"),
        ("shard-00001.safetensors", "metadata edits"),
    }


def add_stray(path: Path) -> None:
    save_file({"stray": torch.zeros(2)}, path / "model-stray.safetensors")
    change(path / "model.safetensors.index.json", lambda index: index["weight_map"].update(stray2=BASE))


# Damage to an exported checkpoint → the file that is named, and what of it.
EXPORTED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "tensor in no file": (add_stray, BASE, "stray2"),
    "tensor in no index": (
        lambda path: change(path / "model.safetensors.index.json", lambda i: i["weight_map"].pop("lm_head.weight")),
        BASE,
        "lm_head.weight",
    ),
    "single file before the index": (
        lambda path: shutil.copyfile(path / BASE, path / "model.safetensors"),
        "model.safetensors",
        "index",
    ),
    "no index": (lambda path: (path / "model.safetensors.index.json").unlink(), "model.safetensors.index.json", ""),
    "another threshold in the config": (
        lambda path: change(path / "config.json", lambda c: c["wise"]["memory"].update(thresholds=[9.0] * 3)),
        "config.json",
        "wise.memory.thresholds",
    ),
    "another module in the config": (
        lambda path: change(path / "config.json", lambda c: c["wise"].update(module="model.layers.1.mlp.down_proj")),
        "config.json",
        "wise.module",
    ),
    "no memory in the config": (
        lambda path: change(path / "config.json", lambda c: c.pop("wise")),
        "config.json",
        "wise.module",
    ),
    "code of another repository": (
        lambda path: change(path / "config.json", lambda c: c["auto_map"].update(AutoModel="some/one--code.Model")),
        "config.json",
        "auto_map.AutoModel",
    ),
    "other code": (
        lambda path: (path / "modeling_wise.py").write_text("import os\n"),
        "modeling_wise.py",
        "custom code",
    ),
    "no code": (lambda path: (path / "side_memory.py").unlink(), "side_memory.py", "custom code"),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_an_exported_checkpoint_that_would_load_as_something_else_is_named(
    root: Path, tmp_path: Path, case: str
) -> None:
    damage, file, what = EXPORTED[case]
    path = copied(root, "edited", tmp_path)
    damage(path)
    assert any(check.file == file and what in f"{check.what} {check.tensor}" for check in differing(path))
    with pytest.raises(GateFailedError, match="checks failed"):
        verify(path).check()


def test_damage_is_found_even_where_the_digests_were_written_anew(root: Path, tmp_path: Path) -> None:
    path = copied(root, "edited", tmp_path)
    (path / "side_memory.py").write_text("import os\n")
    flip_matrix(path / BASE, "model.layers.3.mlp.down_proj.weight")
    names = ("side_memory.py", BASE)
    digests = {name: sha256_file(path / name) for name in names}
    change(path / "router.json", lambda content: content["sha256"].update(digests))
    wrong = differing(reseal(path))
    assert {(check.file, check.tensor) for check in wrong} == {("side_memory.py", None), (str(path), "model.layers.3")}


def flip_matrix(path: Path, name: str) -> None:
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_files_without_a_digest_are_said_not_to_be_checked(root: Path, tmp_path: Path) -> None:
    path = copied(root, "edited", tmp_path)
    kept = json.loads((path / "router.json").read_text())["sha256"][SIDE]
    change(path / "router.json", lambda content: content.update(sha256={SIDE: kept}, sealed=False))
    (path / CHECKSUMS).unlink()  # as versions before left it
    report = verify(path)
    report.check()
    unchecked = {check.file for check in report.checks if check.state == "unchecked"}
    assert unchecked >= {BASE, "side_memory.py", "config.json", CHECKSUMS}


# --- the base model ---


@pytest.mark.parametrize("place", PLACES)
def test_another_base_model_is_named(root: Path, tmp_path: Path, place: str) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    (wrong,) = differing(root / place, model=str(other))
    edited = "model.layers.3.mlp.down_proj.weight" if place == "retrieve" else "model.layers.3"
    assert (wrong.file, wrong.tensor) == (str(other), edited)
    assert wrong.expected != wrong.found
    small = save_tiny(tmp_path / "gpt2", "gpt2")
    found = [check.found for check in differing(root / place, model=str(small))]
    # The matrix is not there; a layer of that number is, of other tensors, and the settings are others.
    assert found == ["nothing"] if place == "retrieve" else (len(found), "nothing" in found) == (2, False)


def test_a_base_model_that_was_moved_is_checked_where_it_is_now(root: Path, tmp_path: Path) -> None:
    path = copied(root, "memory", tmp_path)
    moved = copied(root, "model", tmp_path)
    change(path / "router.json", lambda content: content["base"].update(model=str(tmp_path / "nowhere")))
    report = verify(reseal(path))
    report.check()
    (unchecked,) = [check for check in report.checks if check.state == "unchecked"]
    assert "--model" in unchecked.found
    told = verify(path, model=str(moved))
    assert {check.state for check in told.checks} == {"same"}
    change(moved / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    assert [check.what for check in differing(path, model=str(moved))] == ["settings of the base model"]
    with pytest.raises(ModelError):
        verify(path, model=str(tmp_path / "nowhere"))


# --- the command ---


@pytest.mark.parametrize("place", PLACES)
def test_the_command_says_a_line_a_check_and_exits_with_0(root: Path, place: str) -> None:
    outcome = CliRunner().invoke(program(), ["verify", str(root / place)])
    assert outcome.exit_code == 0
    lines = outcome.stdout.splitlines()
    assert len(lines) == len(verify(root / place).checks)
    assert all(line.startswith("ok ") for line in lines)


def test_the_command_names_differences_and_exits_with_1(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(root, "memory", tmp_path)
    flip(path / "memory.safetensors")
    (tmp_path / "empty").mkdir()
    for arguments, code in ((["verify", str(path)], 1), (["verify", str(tmp_path / "empty")], 2)):
        monkeypatch.setattr("sys.argv", ["wise", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == code
        said = capsys.readouterr()
        assert said.err.splitlines()[-1].startswith("error: ")
        (wrong,) = [line for line in said.out.splitlines() if line.startswith("DIFFERS")] or [""]
        assert ("memory.safetensors: sha256: expected" in wrong) == (code == 1)


def test_the_code_that_version_0_1_wrote_is_known() -> None:
    written = former_code("llama")
    assert written.keys() == {"modeling_wise.py", "wise_memory.py", "prompt_gate.py"}
    # What `wise export` of 0.1.0 wrote for SmolLM2.
    assert written["modeling_wise.py"] == "82b7eb7e7c8cbf66640008d59e5d4c89aca1c92cd230e0e059ba0a63d018a106"


def test_json_names_every_check(root: Path) -> None:
    outcome = CliRunner().invoke(program(), ["verify", str(root / "memory"), "--json", "-q"])
    results = json.loads(outcome.stdout)["results"]
    assert results["differences"] == 0
    assert results["checks"] == len(results["list"]) > 3
    assert {"what", "file", "state", "tensor", "expected", "found"} == results["list"][0].keys()
