"""No byte of a memory, its history or an export changes unseen."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.helpers import save_tiny
from support.history import FLAGS, batch_from, fact, write
from support.loading import CPU
from support.places import change
from support.tiny_models import Wise

from wisecli.artifacts.checksums import CHECKSUMS, read_checksums, require_checksums, write_checksums
from wisecli.commands.checkpoint.export import export
from wisecli.commands.checkpoint.verify import verify
from wisecli.commands.edit.edit import edit
from wisecli.commands.edit.edit_into import IntoMemory, IntoReport, edit_into
from wisecli.commands.memory.log import log
from wisecli.commands.memory.merge import merge
from wisecli.commands.memory.merge_into import merge_into
from wisecli.commands.memory.remove import remove
from wisecli.commands.memory.rollback import rollback
from wisecli.config import EditSettings, MergeSettings
from wisecli.errors import DamagedFileError, WiseError
from wisecli.io.checkpoint import write_json
from wisecli.io.digest import sha256_text
from wisecli.memory.history.release_log import HISTORY, LOG, read_history

EXPORTS = ("edited", "merged", "delta")
DIRECTORIES = ("memory", "bare", *EXPORTS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory with a history of three releases, one without any, and every form of export."""
    root = tmp_path_factory.mktemp("seal")
    model = save_tiny(root / "model")
    edits = write(root / "edits.jsonl", [fact(0), fact(1)])
    edit(str(model), edits, root / "shards", EditSettings(**FLAGS), load=CPU)
    merge([root / "shards"], root / "memory", MergeSettings())
    merge([root / "shards"], root / "bare", MergeSettings(), history=False)
    edit(str(model), edits, root / "at-matrix", EditSettings(**FLAGS, site="matrix"), load=CPU)
    merge([root / "at-matrix"], root / "matrix", MergeSettings(mode="merge"), history=False)
    into(root, root / "memory")
    remove(root / "memory", ["e1"])
    export(root / "memory", root / "edited", load=CPU)
    export(root / "matrix", root / "merged", "merged", load=CPU)
    export(root / "memory", root / "delta", "delta", load=CPU)
    return root


def into(root: Path, memory: Path) -> IntoReport:
    batch = batch_from(write(root / "more.jsonl", [fact(2), fact(1, target=3)]))
    return edit_into(IntoMemory(str(root / "model"), memory, {}, load=CPU), batch)


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the directories, every file its own."""
    return lambda name: Path(shutil.copytree(root / name, tmp_path / name))


def uses(root: Path, place: Path) -> Iterator[Callable[[], object]]:
    """Everything that must not go by a directory of which any byte is another."""
    yield lambda: verify(place).check()
    if place.name not in EXPORTS:
        yield lambda: export(place, place.parent / "out", "delta", load=CPU)
    if place.name == "delta":
        yield lambda: export(place, place.parent / "out", "delta", model=str(root / "model"), load=CPU)
    if place.name == "memory":
        yield lambda: log(place)
        yield lambda: into(root, place)
        yield lambda: merge_into([], place, MergeSettings())
        yield lambda: remove(place, ["e0"])


def require_seen(root: Path, place: Path, what: str) -> None:
    for number, use in enumerate(uses(root, place)):
        with pytest.raises(WiseError):
            use()
            pytest.fail(f"{what} passes use {number}")
    assert not (place.parent / "out").exists()


def test_what_is_whole_passes_every_use(root: Path, copy: Callable[[str], Path]) -> None:
    for name in DIRECTORIES:
        place = copy(name)
        assert {check.state for check in verify(place).checks} == {"same"}
        assert read_checksums(place).keys() == {
            path.relative_to(place).as_posix() for path in files_of(place) if path.name != CHECKSUMS
        }
        require_checksums(place, expected=True)
    sums = subprocess.run(["sha256sum", "-c", "--quiet", CHECKSUMS], cwd=root / "memory", check=False)
    assert sums.returncode == 0


@pytest.mark.parametrize("name", DIRECTORIES)
def test_no_byte_changes_unseen(root: Path, copy: Callable[[str], Path], name: str, sweep: Any) -> None:
    place, chance = copy(name), random.Random(name)
    for path in files_of(place):
        content = path.read_bytes()
        inner = chance.sample(range(len(content)), min(sweep(1, 20), len(content)))
        for at in dict.fromkeys((len(content) - 1, *sweep((), (0,)), *inner)):
            for bit in sweep((1,), (1, 128)):
                path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
                with pytest.raises(WiseError):
                    verify(place).check()
                    pytest.fail(f"byte {at} of {path}")
        for damage in (content[:-1], *sweep((), (content + b" ", content + b"\n"))):
            path.write_bytes(damage)
            with pytest.raises(WiseError):
                verify(place).check()
                pytest.fail(f"{len(damage)} bytes of {path}")
        path.unlink()
        with pytest.raises(WiseError):
            verify(place).check()
            pytest.fail(f"no {path}")
        path.write_bytes(content)
    verify(place).check()


@pytest.mark.parametrize("name", DIRECTORIES)
def test_no_command_goes_by_a_changed_byte(root: Path, copy: Callable[[str], Path], name: str, sweep: Any) -> None:
    place, chance = copy(name), random.Random(name)
    every = files_of(place)
    always = [path for path in every if path.name in ("router.json", LOG, CHECKSUMS)]
    for path in sweep(dict.fromkeys((*always, *chance.sample(every, min(2, len(every))))), every):
        content = path.read_bytes()
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        require_seen(root, place, f"byte {at} of {path}")
        path.write_bytes(content)
    verify(place).check()


def leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for step, part in inner for leaf in leaves(part, (*way, step))]
    yield from found or [way]


def altered(content: Any, way: tuple[Any, ...]) -> Any:
    """The same JSON with one value in it another of its type."""
    content = json.loads(json.dumps(content))
    *path, last = way
    holder = content
    for step in path:
        holder = holder[step]
    old = holder[last]
    holder[last] = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}x"
    return content


@pytest.mark.parametrize("name", ["memory", "edited", "merged"])
def test_no_field_of_a_manifest_changes_unseen(root: Path, copy: Callable[[str], Path], name: str, sweep: Any) -> None:
    place = copy(name)
    path = place / ("wise.json" if name == "merged" else "router.json")
    text = path.read_text()
    content, ways = json.loads(text), list(leaves(json.loads(text)))
    assert len(ways) > 10
    for way in sweep(random.Random(0).sample(ways, 10), ways):
        write_json(path, altered(content, way))
        with pytest.raises(WiseError):
            verify(place).check()
            pytest.fail(f"another {way}")
    path.write_text(text)
    verify(place).check()


def test_the_log_holds_against_digests_that_were_taken_anew(root: Path, copy: Callable[[str], Path]) -> None:
    place = copy("memory")
    change(place / "router.json", lambda content: content["edits"][0].update(target="another answer"))
    write_checksums(place)
    require_seen(root, place, "another target")
    place = shutil.copytree(root / "memory", place.parent / "second" / "memory")
    shutil.copyfile(root / "bare" / "memory.safetensors", place / "memory.safetensors")
    write_checksums(place)
    require_seen(root, place, "other tensors")


def test_digests_cannot_just_be_taken_away(root: Path, copy: Callable[[str], Path]) -> None:
    for name in ("memory", "bare", "edited", "delta"):
        place = copy(name)
        (place / CHECKSUMS).unlink()
        require_seen(root, place, "no digests")


def test_a_memory_whose_manifest_was_altered_is_rolled_back(root: Path, copy: Callable[[str], Path]) -> None:
    place = copy("memory")
    change(place / "router.json", lambda content: content["edits"][0].update(target="another answer"))
    with pytest.raises(DamagedFileError, match=r"not the newest release of its log; roll back to a release"):
        log(place)
    assert rollback(place, "3").same
    assert len(log(place).releases) == 4
    shards = next((place / HISTORY / "shards").rglob("shard-*.safetensors"))
    shards.write_bytes(shards.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=shards.name):
        rollback(place, "3")


def test_a_file_more_is_told(copy: Callable[[str], Path]) -> None:
    place = copy("memory")
    (place / HISTORY / "notes.txt").write_text("x")
    report = verify(place)
    report.check()
    assert [check.file for check in report.checks if check.state == "unchecked"] == [f"{HISTORY}/notes.txt"]


@pytest.mark.parametrize("content", ["", "x", f"{'0' * 64}  ../outside\n", f"{'0' * 64} router.json\n"])
def test_a_list_that_is_none_is_refused(root: Path, copy: Callable[[str], Path], content: str) -> None:
    place = copy("memory")
    (place / CHECKSUMS).write_text(content)
    require_seen(root, place, content)


# --- what older versions wrote ---


def as_before(place: Path) -> None:
    """A memory as it was before manifests were under digests."""
    (place / CHECKSUMS).unlink()
    change(place / "router.json", lambda content: content.pop("sealed"))
    if not (place / HISTORY).is_dir():
        return
    lines, previous = [], ""
    for release in read_history(place):
        told = {**asdict(replace(release, previous=previous))}
        del told["manifest"], told["modified"]
        lines.append(json.dumps(told))
        previous = sha256_text(lines[-1])
    (place / HISTORY / LOG).write_text("".join(f"{line}\n" for line in lines))


def test_memories_of_older_versions_are_read_and_come_under_digests(
    root: Path, copy: Callable[[str], Path], wise: Wise
) -> None:
    place = copy("memory")
    as_before(place)
    outcome = wise("log", str(place))
    assert (outcome.code, "`wise merge --into` without shards" in outcome.out) == (0, True), outcome.err
    told = wise("verify", str(place))
    assert told.code == 0, told.out
    assert "not checked SHA256SUMS" in told.out
    export(place, place.parent / "out", "delta", load=CPU)
    assert into(root, place).release.number == 4
    merge_into([], place, MergeSettings())
    assert "every file is as it was written" in wise("log", str(place)).out
    bare = copy("bare")
    as_before(bare)
    export(bare, place.parent / "another", "delta", load=CPU)


# --- signatures ---

needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)
    (tmp_path / "allowed").write_text(f"ann@example.org {path.with_suffix('.pub').read_text()}")
    return path


def by(key: Path, memory: Path | str, *, who: str = "ann@example.org") -> list[str]:
    signature = f"{memory}/{CHECKSUMS}.sig"
    return ["--verify-signature", signature, "--signer", str(key.parent / "allowed"), "--signer-identity", who]


@needs_ssh
def test_a_release_is_signed_and_checked(root: Path, wise: Wise, key: Path) -> None:
    assert wise("merge", str(root / "shards"), "--sign", str(key)).code == 0
    for line in (["log", "memory"], ["verify", "memory"], ["export", "--format", "delta", "-o", "delta"]):
        outcome = wise(*line, *by(key, "memory"))
        assert outcome.code == 0, outcome.err
        assert wise(*line, *by(key, "memory", who="eve@example.org")).code == 1
    # A release that is not signed has no signature, and an older one's does not hold for it.
    old = Path("memory/SHA256SUMS.sig").read_bytes()
    assert wise("remove", "memory", "e0").code == 0
    assert wise("log", "memory", *by(key, "memory")).code == 1
    Path("memory/SHA256SUMS.sig").write_bytes(old)
    assert "does not hold" in wise("log", "memory", *by(key, "memory")).err
    for line in (["rollback", "memory", "--to", "1"], ["merge", "--into", "memory"], ["remove", "memory", "e0"]):
        assert wise(*line, "--sign", str(key)).code == 0
        assert wise("log", "memory", *by(key, "memory")).code == 0
    line = ("edit", str(root / "model"), str(root / "edits.jsonl"), "--into", "memory")
    assert wise(*line, "--sign", str(key)).code == 0
    assert wise("log", "memory", *by(key, "memory")).code == 0
    assert wise("export", "--sign", str(key)).code == 0
    assert wise("verify", "edited", *by(key, "edited")).code == 0


@needs_ssh
def test_who_rewrites_everything_has_no_signature_for_it(root: Path, wise: Wise, key: Path) -> None:
    assert wise("merge", str(root / "shards"), "--no-history", "--sign", str(key)).code == 0
    change(Path("memory/router.json"), lambda content: content["edits"][0].update(target="another answer"))
    write_checksums(Path("memory"))
    assert wise("verify", "memory").code == 0
    for line in (["verify", "memory"], ["export"]):
        outcome = wise(*line, *by(key, "memory"))
        assert (outcome.code, "does not hold" in outcome.err) == (1, True)


@needs_ssh
def test_what_was_to_be_signed_and_is_not_is_not_up_to_date(root: Path, wise: Wise, key: Path) -> None:
    for line, place in ((["merge", str(root / "shards")], "memory"), (["export"], "edited")):
        assert wise(*line).code == 0
        assert "it is not signed" in wise(*line, "--sign", str(key)).err
        assert wise(*line, "--sign", str(key), "--force").code == 0
        assert "up to date" in wise(*line, "--sign", str(key)).out
        assert Path(place, f"{CHECKSUMS}.sig").is_file()


def test_a_key_that_does_not_sign_is_refused_before_anything_is_done(root: Path, wise: Wise, tmp_path: Path) -> None:
    for content in (None, "", "no key"):
        if content is not None:
            (tmp_path / "key").write_text(content)
        for line in (["merge", str(root / "shards")], ["export", "--memory", str(root / "memory")]):
            outcome = wise(*line, "--sign", str(tmp_path / "key"))
            assert (outcome.code, "--sign" in outcome.err) == (2, True)
    if shutil.which("ssh-keygen") is not None:
        (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n")
        outcome = wise("merge", str(root / "shards"), "--sign", str(tmp_path / "key"))
        assert (outcome.code, "does not sign with it" in outcome.err) == (2, True)
    assert list(Path.cwd().iterdir()) == []
    outcome = wise("edit", str(root / "model"), str(root / "edits.jsonl"), "--sign", str(tmp_path / "key"))
    assert (outcome.code, "--into" in outcome.err) == (2, True)
    outcome = wise("log", str(root / "memory"), "--verify-signature", "x")
    assert (outcome.code, "--signer" in outcome.err) == (2, True)


def test_minisign_is_asked_to_sign(root: Path, wise: Wise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "bin" / "minisign"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\n[ "$1 $2 $4" = "-S -s -m" ] && cp "$5" "$7"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    (tmp_path / "key").write_text("untrusted comment: minisign encrypted secret key\nx\n")
    assert wise("merge", str(root / "shards"), "--sign", str(tmp_path / "key")).code == 0
    assert Path("memory/SHA256SUMS.minisig").read_bytes() == Path("memory/SHA256SUMS").read_bytes()
    assert wise("verify", "memory").code == 0
