"""Files that nobody vouches for: whatever they say ends in one sentence, with no traceback and no memory taken."""

import copy
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.helpers import save_tiny
from support.loading import CPU
from support.places import PLACES, change, copied, make_places
from support.thorough import examples

from wisecli import cli
from wisecli.artifacts.memory_manifest import read_memory
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.commands.checkpoint.inspect import inspect
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.memory.merge import merge
from wisecli.config import MergeSettings
from wisecli.edits.record import read_edits
from wisecli.errors import DamagedFileError, EditFileError, ModelError, WiseError
from wisecli.evaluation.edited_model import attach
from wisecli.io.checkpoint import Checkpoint, load_tensors, read_json
from wisecli.io.digest import sha256_file
from wisecli.io.safe_paths import inside
from wisecli.io.safetensors_header import read_header
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.routing.memories.side_memory import SideMemory

ENOUGH = 300 << 20
FEW = settings(
    max_examples=examples(15, 60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
MANY = settings(FEW, max_examples=examples(25, 200))

# Values for any field: of every type, of every size, and some that reach for other files.
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e-300, 1e300, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "\0", "../x", "/etc/passwd", "a/../../b", "C:\\x", "\ud800", "float32", "__class__", "x" * 5000, "-"),
    *([], [[]], [None], [1, -1], [float("nan")], ["x", 2**62, 2**62], {}, {"": {}}, {"x": [[[[]]]]}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_places(tmp_path_factory.mktemp("untrusted"))


@pytest.fixture(scope="module")
def scratch(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies to damage; each test writes back what it changes."""
    target = tmp_path_factory.mktemp("scratch")
    for place in (*PLACES, "gradient", "model"):
        shutil.copytree(root / place, target / place)
    return target


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No test of hostile files may make the process much larger."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < ENOUGH


def manifest_of(place: str) -> str:
    return {"shards": "shards.json", "model": "config.json"}.get(place, "router.json")


def steps_of(value: Any, taken: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every way to a value inside a JSON value."""
    if taken:
        yield taken
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield from steps_of(inner, (*taken, step))


def mutated(content: Any, data: st.DataObject) -> Any:
    """JSON in which one value is another, is gone, or is there twice."""
    content = copy.deepcopy(content)
    *way, last = data.draw(st.sampled_from(list(steps_of(content))))
    holder = content
    for step in way:
        holder = holder[step]
    how = data.draw(st.sampled_from(["replace"] * 6 + ["remove", "twice"]))
    if how == "remove":
        del holder[last]
    elif how == "twice" and isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[last] = data.draw(st.sampled_from(HOSTILE))
    return content


def refused(path: Path, *calls: Callable[[], object]) -> None:
    """Each call works, or ends in one sentence that names a file in ``path``."""
    for call in calls:
        try:
            call()
        except WiseError as error:
            assert str(path) in str(error), error
            assert len(str(error)) < 2000


def read_shards(path: Path) -> None:
    directory = read_shard_directory(path)
    for entry in directory.shards:
        directory.load(entry)
    directory.load_unrelated()


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    monkeypatch.setattr("sys.argv", ["wise", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "a fault in wise" not in said, said
    return stopped.value.code, said


# --- manifests ---


@contextmanager
def written(manifest: Path, content: Any) -> Iterator[None]:
    """A manifest with other content, bytes or JSON, for a while."""
    whole = manifest.read_bytes()
    try:
        manifest.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        yield
    finally:
        manifest.write_bytes(whole)


def mutated_but_base(manifest: Path, data: st.DataObject) -> Any:
    """A manifest's content with another value anywhere, but for its base: hub ids are not asked for here."""
    content = json.loads(manifest.read_text())
    return {**mutated(content, data), "base": content["base"]}


@pytest.mark.parametrize("place", PLACES)
@MANY
@given(data=st.data())
def test_a_manifest_with_another_value_anywhere_is_read_or_refused(
    scratch: Path, place: str, data: st.DataObject
) -> None:
    path = scratch / place
    manifest = path / manifest_of(place)
    with written(manifest, mutated(json.loads(manifest.read_text()), data)):
        read = read_shards if place == "shards" else read_memory
        refused(path, lambda: read(path), lambda: inspect(path))
        report = verify(path)
        assert report.checks


@FEW
@given(data=st.data())
def test_shards_with_another_value_anywhere_are_merged_or_refused(scratch: Path, data: st.DataObject) -> None:
    path, output = scratch / data.draw(st.sampled_from(["shards", "gradient"])), scratch / "merged"
    with written(path / "shards.json", mutated_but_base(path / "shards.json", data)):
        for mode in ("lookup", "merge"):
            with suppress(WiseError):
                merge([path], output, MergeSettings(mode=mode), force=True)


@FEW
@given(data=st.data())
def test_a_memory_with_another_value_anywhere_is_run_or_refused(scratch: Path, data: st.DataObject) -> None:
    path = scratch / data.draw(st.sampled_from(["memory", "retrieve"]))
    with written(path / "router.json", mutated_but_base(path / "router.json", data)):
        try:
            edited = attach(path, load=CPU)
        except WiseError:
            return
        with torch.no_grad():
            edited.model(input_ids=torch.tensor([[4, 5, 6]]))


TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "nested lists": b"[" * 10**5,
    "nested objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "nested below the stack's end": b'{"schema": ' + b"[" * 500 + b"]" * 500 + b"}",
    "a number without end": b'{"schema": ' + b"9" * 10**5 + b"}",
    "no UTF-8": b'{"schema": "\xff\xfe"}',
    "half a character": b'{"schema": "\\ud800"}',
    "a null byte": b"\0",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("place", ["shards", "memory", "edited"])
@pytest.mark.parametrize("command", ["inspect", "verify", "merge", "eval"])
def test_text_that_is_no_manifest_ends_in_one_sentence(
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    text: bytes,
    command: str,
) -> None:
    with written(scratch / place / manifest_of(place), text):
        code, said = run(monkeypatch, capsys, command, str(scratch / place))
    assert code == (1 if command == "verify" else 2)
    assert said.splitlines()[-1].startswith("error: ")
    if command != "eval" or place != "shards":
        assert str(scratch / place) in said


def test_a_manifest_of_terabytes_is_not_read(scratch: Path, tmp_path: Path) -> None:
    place = copied(scratch, "memory", tmp_path)
    with (place / "router.json").open("r+b") as stream:
        stream.truncate(1 << 42)
    with pytest.raises(DamagedFileError, match=r"router\.json: larger than"):
        read_memory(place)


@pytest.mark.parametrize("name", ["router.json", "memory.safetensors"])
def test_what_is_no_file_is_not_waited_for(scratch: Path, tmp_path: Path, name: str) -> None:
    place = copied(scratch, "memory", tmp_path)
    (place / name).unlink()
    os.mkfifo(place / name)
    for call in (read_memory, inspect):
        with pytest.raises(DamagedFileError, match="not a regular file"):
            call(place)
    assert verify(place).differences
    with pytest.raises(DamagedFileError, match="not a regular file"):
        read_json(Path("/dev/zero"))


# --- headers ---


def headed(path: Path, header: bytes, *, length: int | None = None, body: bytes = b"\0" * 64) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + body)
    return path


def entry(dtype: Any = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


LYING: dict[str, bytes] = {
    "terabytes": entry(shape=[2**40], offsets=[0, 2**42]),
    "a shape that overflows": entry(shape=[2**62, 8], offsets=[0, 64]),
    "a shape beyond 64 bits": entry(shape=[2**64 + 4, 4]),
    "a negative shape": entry(shape=[-4, -4]),
    "a shape of fractions": entry(shape=[4.0, 4]),
    "a shape of truths": entry(shape=[True, 16]),
    "a shape that is a text": entry(shape="44"),
    "an unknown type": entry(dtype="F33"),
    "a type that is a list": entry(dtype=["F32"]),
    "offsets beyond the file": entry(offsets=[64, 128]),
    "offsets that go back": entry(offsets=[64, 0]),
    "offsets with a hole": entry(shape=[4], offsets=[8, 24]),
    "too few offsets": entry(offsets=[64]),
    "offsets of texts": entry(offsets=["0", "64"]),
    "less than the file holds": entry(shape=[4], offsets=[0, 16]),
    "an entry that is a number": b'{"a": 5}',
    "metadata that are a number": b'{"__metadata__": 5}',
    "metadata of numbers": b'{"__metadata__": {"a": 5}}',
    "no object": b"[]",
    "no JSON": b"{",
    "nesting without end": b"[" * 10**5,
    "no UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("header", LYING.values(), ids=LYING)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    path = headed(tmp_path / "model.safetensors", header)
    for call in (read_header, load_tensors):
        with pytest.raises(DamagedFileError, match=r"model\.safetensors: not a whole safetensors file"):
            call(path)
    with pytest.raises(DamagedFileError):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 200, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_header_cannot_be_longer_than_its_file(tmp_path: Path, length: int, sparse: bool) -> None:
    path = headed(tmp_path / "model.safetensors", entry(), length=length)
    if sparse:
        with path.open("r+b") as stream:
            stream.truncate(1 << 41)
    for call in (read_header, load_tensors):
        with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
            call(path)


@MANY
@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_header_with_other_bytes_is_read_or_refused(tmp_path: Path, place: int, byte: int, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b.weight": torch.zeros(5, dtype=torch.int32)}, path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    refused(path, lambda: read_header(path), lambda: load_tensors(path), lambda: Checkpoint(tmp_path))


@given(st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 4), max_size=3), max_size=5), st.data())
@FEW
def test_a_header_says_what_was_saved(tmp_path: Path, shapes: dict[str, list[int]], data: st.DataObject) -> None:
    types = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
    shapes.pop("__metadata__", None)
    tensors = {name: torch.zeros(shape, dtype=data.draw(st.sampled_from(types))) for name, shape in shapes.items()}
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, metadata={"what": "ever"})
    header = read_header(path)
    assert header.metadata == {"what": "ever"}
    assert header.bytes == path.stat().st_size
    found = {name: (one.dtype, one.shape) for name, one in header.tensors.items()}
    assert found == {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}


# --- tensors that belong to no such file, with digests that agree ---


def rewritten(place: Path, file: str, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(place / file)
    how(tensors)
    save_file(tensors, place / file)
    digest = sha256_file(place / file)

    def note(content: dict[str, Any]) -> None:
        if "shards" in content:
            next(shard for shard in content["shards"] if shard["file"] == file)["sha256"] = digest
        else:
            content["sha256"][file] = digest

    change(place / manifest_of("shards" if file.startswith("shard") else "memory"), note)


@pytest.mark.parametrize(
    ("kind", "tensor", "value"),
    [
        ("memory", "key_to_edit", 3),
        ("memory", "key_to_edit", -1),
        ("memory", "whitening_index", 9),
        ("memory", "key_to_residual", 10**6),
        ("memory", "cosine_offset", float("nan")),
        ("memory", "floors", float("inf")),
        ("shards", "mask.indices", 64),
        ("shards", "mask.indices", -1),
        ("shards", "evidence.edit", 3),
        ("shards", "evidence.position", -1),
        ("shards", "evidence.keys", float("nan")),
        ("shards", "evidence.residuals", float("inf")),
        ("shards", "evidence.held_out", True),
    ],
)
def test_what_points_outside_of_itself_is_refused(
    scratch: Path, tmp_path: Path, kind: str, tensor: str, value: float
) -> None:
    place = copied(scratch, kind, tmp_path)
    file, says = ("memory", f"tensor {tensor} ") if kind == "memory" else ("shard-00000", "")
    rewritten(place, f"{file}.safetensors", lambda tensors: tensors[tensor].fill_(value))
    with pytest.raises(DamagedFileError, match=rf"{file}\.safetensors: {says}"):
        (read_memory if kind == "memory" else read_shards)(place)


# --- descriptions that allocate ---


@pytest.mark.parametrize(
    "layout",
    [
        ["float32", 2**40],
        ["float32", 2**62, 4],
        ["float32", -1],
        ["float32", -(2**40), -(2**40)],
        ["float32", 0.5],
        ["float32", "x"],
        ["float33", 1],
        ["load", 1],
        ["__class__"],
        [3, 1],
    ],
)
def test_a_description_cannot_ask_for_tensors_that_no_memory_has(
    layout: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("something was allocated"))
    described = {"thresholds": [1.0], "router": "norm", "pooling": "mean", "kind": "matrix"}
    with pytest.raises(ValueError, match="tensor delta cannot be right"):
        SideMemory.from_description({**described, "tensors": {"delta": layout}})


def test_a_manifest_cannot_describe_other_tensors_than_its_file_holds(scratch: Path, tmp_path: Path) -> None:
    for number, layout in enumerate((["float16", 2**40, 2**20], ["float16", -1, 5], ["float64", 16, 64])):
        place = copied(scratch, "memory", tmp_path / str(number))
        change(
            place / "router.json", lambda content, own=layout: content["memory"]["tensors"].update(whitened_keys=own)
        )
        with pytest.raises(DamagedFileError):
            read_memory(place)


# --- names of files ---

OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "C:\\x", "\\\\host\\share", "..\\x", "x\0y", "a/.."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_directory_are_refused(scratch: Path, tmp_path: Path, name: str) -> None:
    for follow in (False, True):
        with pytest.raises(DamagedFileError, match="leads out of the directory"):
            inside(tmp_path, name, follow=follow)
    shards, memory, edited, model = (copied(scratch, p, tmp_path) for p in ("shards", "memory", "edited", "model"))
    change(shards / "shards.json", lambda content: content["shards"][0].update(file=name))
    change(
        memory / "router.json",
        lambda content: (content["memory"].update(file=name), content["sha256"].update({name: "0"})),
    )
    change(edited / "model.safetensors.index.json", lambda index: index["weight_map"].update(x=name))
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    for call in (
        lambda: read_shards(shards),
        lambda: inspect(shards),
        lambda: read_memory(memory),
        lambda: inspect(memory),
        lambda: Checkpoint(edited),
        lambda: Checkpoint(model),
    ):
        with pytest.raises(DamagedFileError, match="leads out of the directory"):
            call()
    for place in (shards, memory, edited):
        assert any("leads out" in check.found for check in verify(place).differences)


LINKS = [
    ("shards", "shard-00000.safetensors"),
    ("shards", "unrelated.safetensors"),
    ("memory", "memory.safetensors"),
    ("edited", "model-side-memory.safetensors"),
]


@pytest.mark.parametrize(("place", "file"), LINKS)
def test_links_that_leave_a_directory_of_ours_are_refused(scratch: Path, tmp_path: Path, place: str, file: str) -> None:
    path = copied(scratch, place, tmp_path)
    (path / file).rename(tmp_path / "elsewhere")
    (path / file).symlink_to(tmp_path / "elsewhere")
    read = read_shards if place == "shards" else read_memory
    with pytest.raises(DamagedFileError, match=rf"{file}: it is a link that leaves the directory"):
        read(path)
    assert file in {check.file for check in verify(path).differences}


def test_links_inside_a_directory_and_to_it_are_followed(scratch: Path, tmp_path: Path) -> None:
    path = copied(scratch, "memory", tmp_path)
    (path / "memory.safetensors").rename(path / "kept")
    (path / "memory.safetensors").symlink_to("kept")
    (tmp_path / "link").symlink_to(path)
    read_memory(tmp_path / "link")
    assert not verify(tmp_path / "link").differences
    (path / "memory.safetensors").unlink()
    (path / "memory.safetensors").symlink_to("memory.safetensors")
    with pytest.raises(DamagedFileError):
        read_memory(path)


def test_an_index_entry_that_is_a_link_out_of_an_exported_checkpoint_is_named(scratch: Path, tmp_path: Path) -> None:
    path = copied(scratch, "edited", tmp_path)
    (path / "model-base.safetensors").rename(tmp_path / "elsewhere")
    (path / "model-base.safetensors").symlink_to(tmp_path / "elsewhere")
    wrong = verify(path).differences
    assert any(check.file == "model-base.safetensors" and "link that leaves" in check.found for check in wrong)
    with pytest.raises(DamagedFileError, match="link that leaves"):
        attach(path, load=CPU)


def test_the_hub_cache_keeps_models_and_checkpoints_as_links(scratch: Path, tmp_path: Path) -> None:
    for place in ("model", "edited"):
        snapshot, blobs = tmp_path / place / "snapshots" / "abc", tmp_path / place / "blobs"
        for directory in (snapshot, blobs):
            directory.mkdir(parents=True)
        for number, file in enumerate(sorted((scratch / place).iterdir())):
            shutil.copyfile(file, blobs / str(number))
            (snapshot / file.name).symlink_to(Path("../..") / "blobs" / str(number))
        assert list(Checkpoint(snapshot))
    report = verify(tmp_path / "edited/snapshots/abc", model=str(tmp_path / "model/snapshots/abc"))
    assert not report.differences
    read_memory(tmp_path / "edited/snapshots/abc")


# --- edits ---

JSON = st.recursive(
    st.sampled_from(HOSTILE) | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)
NAMES = (
    *(
        "id",
        "op",
        "prompt",
        "src",
        "target",
        "alt",
        "target_new",
        "subject",
        "rephrases",
        "rephrase_prompt",
        "locality",
    ),
    *("portability", "loc", "loc_ans", "irrelevant", "ood", "requested_rewrite", "neighborhood_prompts", "str"),
    *("locality_prompt", "locality_ground_truth", "target_true"),
)
FIELDS = st.sampled_from(NAMES)
RECORDS = st.dictionaries(
    FIELDS, JSON | st.dictionaries(FIELDS | st.sampled_from(["ground_truth", "answer"]), JSON, max_size=3), max_size=6
)


@MANY
@given(st.lists(RECORDS, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_edits_of_any_values_are_read_or_refused(
    tmp_path: Path, records: list[dict[str, Any]], array: bool, complete: bool
) -> None:
    path = tmp_path / "edits.jsonl"
    if complete:
        records = [{"prompt": "a", "target": "b", **record} for record in records]
    text = json.dumps(records) if array else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text)
    try:
        for edit in read_edits(path):
            json.dumps(edit.as_dict()).encode()
            assert edit == type(edit).from_dict(json.loads(json.dumps(edit.as_dict())))
    except EditFileError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 1000


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("before", [b"", b'[{"prompt": "a", "target": "b"},', b'{"prompt": "a", "target": "b"}\n'])
def test_text_that_is_no_edit_ends_in_one_sentence(
    scratch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: bytes,
    text: bytes,
) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(before + (text or b"{"))
    code, said = run(monkeypatch, capsys, "edit", str(scratch / "model"), str(path), "-o", str(tmp_path / "out"))
    assert code == 2
    assert said.splitlines()[-1].startswith("error: ")
    assert "edits.jsonl" in said
    assert not (tmp_path / "out").exists()


# --- config.json ---


@settings(FEW, max_examples=examples(20, 120))
@given(data=st.data())
def test_a_config_with_another_value_anywhere_is_loaded_or_refused(scratch: Path, data: st.DataObject) -> None:
    path = scratch / "model"
    config = path / "config.json"
    whole = config.read_text()
    try:
        config.write_text(json.dumps(mutated(json.loads(whole), data)))
        refused(path, lambda: find_site(path, Checkpoint(path)), lambda: load_model(path, load=CPU))
    finally:
        config.write_text(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "5"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 2.5},
        {"hidden_size": 2**40},
        {"vocab_size": 2**50},
        {"vocab_size": -5},
        {"intermediate_size": 0},
        {"num_attention_heads": 0},
        {"model_type": None},
        {"model_type": ["llama"]},
        {"model_type": "../../x"},
        {"wise": 5},
        {"wise": {"model_type": 5}},
    ],
    ids=str,
)
def test_a_config_that_is_not_the_models_ends_in_one_sentence(
    scratch: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
) -> None:
    path = copied(scratch, "model", tmp_path)
    change(path / "config.json", lambda config: config.update(changes))
    edits = str(root / "edits.jsonl")
    code, said = run(monkeypatch, capsys, "edit", str(path), edits, "-o", str(tmp_path / "out"), "--layer", "1")
    assert code == 2 or "wise" in changes
    assert code == 0 or str(path) in said


def test_code_of_a_model_never_runs_unless_it_is_trusted(scratch: Path, tmp_path: Path) -> None:
    """Neither the base model's nor an exported checkpoint's, whatever their config asks for."""
    for place in ("model", "edited"):
        path = copied(scratch, place, tmp_path)
        trap = tmp_path / f"{place}-ran"
        for name in ("modeling_wise.py", "side_memory.py", "evil.py"):
            (path / name).write_text(f"open({str(trap)!r}, 'w').close()\n")
        auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        change(path / "config.json", lambda config, own=auto: config.update(auto_map=own))
        change(path / "tokenizer_config.json", lambda config, own=auto: config.update(auto_map=own))
        try:
            load_model(path, load=CPU)
        except ModelError as error:
            assert str(path) in str(error)
        if place == "edited":
            attach(path, load=CPU)
            verify(path)
            inspect(path)
        assert not trap.exists()


def test_a_matrix_of_another_shape_is_no_base(scratch: Path, tmp_path: Path) -> None:
    memory, small = copied(scratch, "memory", tmp_path), save_tiny(tmp_path / "gptj", "gptj")
    for changes in ({"d": 64, "d_ff": 32}, {"transposed": True}):
        change(memory / "router.json", lambda content, own=changes: content["site"].update(own))
        with pytest.raises(WiseError):
            attach(memory, load=CPU)
    with pytest.raises(WiseError):
        attach(scratch / "memory", model=str(small), load=CPU)
