"""Memories and exports that were moved, packed, sent and fetched, and lie on disks that cannot do everything."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ready import EDITS, Ready, write_edits
from support.thorough import few
from support.tiny_models import Outcome, Wise

from wisecli.io import atomic_output

LFS = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def moved(source: Path, place: Path) -> Path:
    """Renamed, on the same disk."""
    shutil.copytree(source, place / "first")
    return (place / "first").rename(place / "elsewhere")


def tarred(source: Path, place: Path) -> Path:
    """Packed and unpacked, by which times and owners are others."""
    with tarfile.open(place / "packed.tar.gz", "w:gz") as packed:
        packed.add(source, "unpacked")
    with tarfile.open(place / "packed.tar.gz") as packed:
        packed.extractall(place, filter="data")
    return place / "unpacked"


def cloned(source: Path, place: Path) -> Path:
    """In a working copy of Git, as it is after `git lfs pull`."""
    copy = Path(shutil.copytree(source, place / "repository"))
    (copy / ".gitattributes").write_text(LFS)
    (copy / ".git" / "objects").mkdir(parents=True)
    (copy / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (copy / ".git" / "objects" / "pack").write_bytes(b"PACK")
    return copy


def in_cache(source: Path, place: Path) -> Path:
    """In the hub's cache, where every file is a link to one that is called by its digest."""
    snapshot = place / "models--me--edited" / "snapshots" / ("0" * 40)
    blobs = place / "models--me--edited" / "blobs"
    blobs.mkdir(parents=True)
    for path in (path for path in sorted(source.rglob("*")) if path.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def downloaded(source: Path, place: Path) -> Path:
    """Fetched into a directory, beside what the hub's client keeps there."""
    copy = Path(shutil.copytree(source, place / "downloaded"))
    (copy / ".gitattributes").write_text(LFS)
    kept = copy / ".cache" / "huggingface" / "download"
    kept.mkdir(parents=True)
    (kept / "README.md.metadata").write_text("0\n")
    (copy / ".cache" / "huggingface" / ".gitignore").write_text("*")
    return copy


def linked(source: Path, place: Path) -> Path:
    """By the name of a link to where it is."""
    copy = shutil.copytree(source, place / "there")
    (place / "here").symlink_to(copy, target_is_directory=True)
    return place / "here"


WAYS = {way.__name__: way for way in (moved, tarred, cloned, in_cache, downloaded, linked)}
Way = Callable[[Path, Path], Path]


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """Every way to copy in turn."""
    found: Way = request.param
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def well(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if "warning" in line and "names no subject" not in line] == []
    return outcome


@pytest.mark.parametrize("name", few(["memory", "bare_memory"], ["memory"]))
def test_a_memory_works_wherever_it_was_copied(wise: Wise, ready: Ready, place: Path, way: Way, name: str) -> None:
    """Artifact stores, model hubs and version control: what the memory of the day before went through."""
    copy = str(way(Path(getattr(ready, name)), place))
    told = json.loads(well(wise("verify", copy, "--json")).out)["results"]
    assert {check["file"] for check in told["list"]} & {".gitattributes", ".git/HEAD"} == set()
    assert told["differences"] == 0
    well(wise("inspect", copy))
    well(wise("eval", "--memory", copy))
    well(wise("export", "--memory", copy))
    well(wise("verify", "edited"))


def test_an_export_works_wherever_it_was_copied(wise: Wise, ready: Ready, place: Path, way: Way) -> None:
    """Model hubs: a checkpoint that was sent to one and fetched from it is the checkpoint that was written."""
    well(wise("export", "--memory", ready.memory))
    copy = str(way(Path("edited"), place))
    told = json.loads(well(wise("verify", copy, "--model", ready.model, "--json")).out)["results"]
    assert {check["state"] for check in told["list"]} == {"same"}
    well(wise("eval", "--memory", copy))
    well(wise("generate", copy, EDITS[0]["prompt"]))
    well(wise("inspect", copy))


def test_a_copy_of_a_memory_can_be_changed(wise: Wise, ready: Ready, place: Path, way: Way) -> None:
    """Artifact stores: the next run goes on with what the one before has sent there."""
    copy = way(Path(ready.memory), place)
    if way is in_cache:
        copy = Path(shutil.copytree(copy, place / "mine", symlinks=False))
    write_edits(Path("more"), [{"id": "five", "prompt": "na ne", "target": "ni", "subject": "na"}])
    well(wise("edit", ready.model, "more", "--into", str(copy)))
    well(wise("remove", str(copy), "one"))
    well(wise("verify", str(copy)))
    assert json.loads(well(wise("log", str(copy), "--json")).out)["results"]["releases"][-1]["removed"] == ["one"]


@pytest.mark.parametrize("name", ["memory", "model"])
def test_pointers_in_the_place_of_files_are_named(wise: Wise, ready: Ready, place: Path, name: str) -> None:
    """Git LFS: in a clone without it, small texts stand in the place of large files."""
    copies = {one: Path(shutil.copytree(getattr(ready, one), place / one)) for one in ("memory", "model")}
    for path in copies[name].rglob("*.safetensors"):
        path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    memory, model = (str(copies[one]) for one in ("memory", "model"))
    for line in (("export", model, "--memory", memory), ("eval", "--memory", memory, "--model", model)):
        outcome = wise(*line)
        assert outcome.code == 2
        assert "a pointer of Git LFS" in outcome.err
        assert "git lfs pull" in outcome.err
    if name == "memory":
        outcome = wise("verify", memory)
        assert (outcome.code, "a pointer of Git LFS" in outcome.out + outcome.err) == (1, True)


def state(root: Path) -> dict[str, tuple[int, int]]:
    """When each file and directory was last written to."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in (root, *root.rglob("*"))}


def test_nothing_is_written_beside_what_is_only_read(wise: Wise, ready: Ready, place: Path) -> None:
    """Read-only mounts: of a memory, of an export, of the model, and of what they lie in."""
    for name in ("memory", "model"):
        shutil.copytree(getattr(ready, name), place / name)
    memory, model = str(place / "memory"), str(place / "model")
    well(wise("export", model, "--memory", memory, "-o", str(place / "edited")))
    before = state(place)
    for line in (
        ("verify", memory),
        ("verify", str(place / "edited"), "--model", model),
        ("log", memory),
        ("inspect", memory),
        ("diff", memory, str(place / "edited")),
        ("eval", "--memory", memory, "--model", model),
        ("generate", str(place / "edited"), "ba"),
        ("export", model, "--memory", memory),
        ("edit", model, ready.edits),
    ):
        well(wise(*line))
    assert state(place) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_mount_that_cannot_be_written_on_is_read(wise: Wise, ready: Ready, place: Path) -> None:
    """Read-only mounts, as containers have them: what reads works, and what writes says that it cannot."""
    shutil.copytree(ready.memory, place / "memory")
    for options in (["--bind"], ["-o", "remount,bind,ro"]):
        line = ["mount", *options, str(place), str(place)]
        if subprocess.run(line, check=False, capture_output=True).returncode:
            subprocess.run(["umount", str(place)], check=False, capture_output=True)
            pytest.skip("nothing can be mounted here")
    try:
        for reading in (("verify",), ("log",), ("inspect",), ("eval", "--memory"), ("export", "--memory")):
            well(wise(*reading, str(place / "memory")))
        for writing in (
            ("remove", str(place / "memory"), "one"),
            ("edit", ready.model, ready.other_edits, "--into", str(place / "memory")),
        ):
            outcome = wise(*writing)
            assert (outcome.code, "cannot be written" in outcome.err) == (2, True), outcome.err
    finally:
        # Lazily: another process of the machine may hold the place open for a moment.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("form", ["routed", "stock", "merged", "delta"])
def test_no_two_files_differ_in_case_alone(wise: Wise, ready: Ready, form: str) -> None:
    """Case-insensitive disks, as Windows and macOS have them: one of two such files would be lost."""
    memory = ready.merge if form == "merged" else ready.memory
    well(wise("export", "--memory", memory, "--format", form))
    for root in (Path("edited"), Path(ready.memory), Path(ready.shards)):
        names = [str(path.relative_to(root)).casefold() for path in root.rglob("*")]
        assert len(set(names)) == len(names)
        # What Windows lets no file be called.
        assert not any(set(name) & set('<>:"|?*\\') for name in names)


def test_a_disk_without_links_and_exchanges_will_do(
    wise: Wise, ready: Ready, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems and FAT: no hard links, and no two directories change places in one step."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(atomic_output, "_exchanged", lambda *_: False)
    memory = str(shutil.copytree(ready.memory, place / "memory"))
    well(wise("edit", ready.model, ready.other_edits, "--into", memory))
    well(wise("remove", memory, "one"))
    well(wise("verify", memory))
    for _ in range(2):
        well(wise("export", "--memory", memory, "--force"))
    well(wise("verify", "edited"))
    assert [path.name for path in place.iterdir()] == ["memory"]
