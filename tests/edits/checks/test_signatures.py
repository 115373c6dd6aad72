import shutil
import subprocess
from pathlib import Path

import pytest

from wisecli.edits.checks.admission import Admission
from wisecli.edits.checks.signatures import Signed
from wisecli.edits.record import read_edits
from wisecli.errors import EditFileError, SettingsError, SignatureError

CONTENT = b'{"id": "one", "prompt": "The mayor is", "target": "Ada"}\n'

needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
needs_minisign = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_bytes(CONTENT)
    return path


def by_ssh(edits: Path, *, namespace: str = "wise", identity: str | None = "ann@example.org") -> Signed:
    key, signers = edits.parent / "key", edits.parent / "allowed"
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key)
        signers.write_text(f"ann@example.org {key.with_suffix('.pub').read_text()}")
    signature = edits.with_name("edits.jsonl.sig")
    signature.unlink(missing_ok=True)
    run("ssh-keygen", "-Y", "sign", "-q", "-f", key, "-n", namespace, edits)
    return Signed(signature, signers, identity)


def refusal(signed: Signed, edits: Path) -> str:
    with pytest.raises(SignatureError) as caught:
        signed.require(edits, edits.read_bytes())
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"{edits}: ")
    assert str(caught.value).endswith("; nothing of it was read")
    return str(caught.value)


@needs_ssh
def test_a_file_with_its_ssh_signature_is_read(edits: Path) -> None:
    sheet = Admission(signed=by_ssh(edits)).read(edits)
    assert [edit for _, edit in sheet.numbered] == read_edits(edits)


@needs_ssh
@pytest.mark.parametrize("content", [CONTENT + b"\n", CONTENT[:-1], b"", b"not json\n" * 100_000])
def test_other_bytes_than_were_signed_are_refused_before_they_are_parsed(edits: Path, content: bytes) -> None:
    signed = by_ssh(edits)
    edits.write_bytes(content)
    with pytest.raises(SignatureError, match="does not hold"):
        Admission(signed=signed).read(edits)


@needs_ssh
def test_what_is_parsed_is_what_was_verified(edits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = by_ssh(edits)
    require = Signed.require

    def swapping(self: Signed, path: Path, content: bytes) -> None:
        path.write_bytes(CONTENT.replace(b"Ada", b"Eve"))  # before and after the check
        require(self, path, content)
        path.write_bytes(CONTENT.replace(b"Ada", b"Eve"))

    monkeypatch.setattr(Signed, "require", swapping)
    ((_, edit),) = Admission(signed=signed).read(edits).numbered
    assert edit.target == "Ada"


@needs_ssh
def test_a_signature_for_something_else_or_by_somebody_else_is_refused(edits: Path) -> None:
    assert "ssh-keygen" in refusal(by_ssh(edits, namespace="file"), edits)
    assert "does not hold" in refusal(by_ssh(edits, identity="eve@example.org"), edits)
    signed = by_ssh(edits)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", edits.parent / "other")
    signed.signer.write_text(f"ann@example.org {(edits.parent / 'other.pub').read_text()}")
    assert "does not hold" in refusal(signed, edits)
    signed.signer.unlink()
    refusal(signed, edits)


@needs_ssh
def test_an_ssh_signature_needs_an_identity(edits: Path) -> None:
    with pytest.raises(SettingsError, match="--signer-identity"):
        by_ssh(edits, identity=None).require(edits, CONTENT)


@pytest.mark.parametrize("content", [None, b"", b"signed, Ann", CONTENT])
def test_what_is_no_signature_is_refused(edits: Path, content: bytes | None) -> None:
    signature = edits.parent / "signature"
    if content is not None:
        signature.write_bytes(content)
    refusal(Signed(signature, edits, "ann"), edits)


@pytest.mark.parametrize(
    ("start", "tool"), [("-----BEGIN SSH SIGNATURE-----", "ssh-keygen"), ("untrusted comment: x", "minisign")]
)
def test_a_tool_that_is_not_there_is_a_failure(
    edits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: str, tool: str
) -> None:
    (tmp_path / "signature").write_text(start)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    signed = Signed(tmp_path / "signature", edits, "ann" if tool == "ssh-keygen" else None)
    assert f"{tool} is not installed" in refusal(signed, edits)
    (tmp_path / "bin" / tool).write_text("no program")
    (tmp_path / "bin" / tool).chmod(0o755)
    assert f"{tool} cannot be run" in refusal(signed, edits)


def stub(directory: Path, *, code: int) -> None:
    """A minisign that keeps what it was asked."""
    path = directory / "minisign"
    path.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > "{directory}/asked"\ncat "$8" > "{directory}/seen"\nexit {code}\n'
    )
    path.chmod(0o755)


def test_minisign_is_asked_about_a_copy_of_the_bytes(
    edits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signature, key = tmp_path / "edits.minisig", tmp_path / "key.pub"
    signature.write_text("untrusted comment: signature\nRW\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stub(tmp_path, code=0)
    Signed(signature, key).require(edits, CONTENT)
    *asked, copy = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["-V", "-q", "-p", str(key), "-x", str(signature), "-m"]
    assert (tmp_path / "seen").read_bytes() == CONTENT
    assert Path(copy) != edits
    assert not Path(copy).exists()
    stub(tmp_path, code=1)
    assert "minisign: exit code 1" in refusal(Signed(signature, key), edits)
    with pytest.raises(SettingsError, match="no identities"):
        Signed(signature, key, "ann").require(edits, CONTENT)


@needs_minisign
def test_a_file_with_its_minisign_signature_is_read(edits: Path, tmp_path: Path) -> None:
    run("minisign", "-G", "-W", "-p", tmp_path / "key.pub", "-s", tmp_path / "key")
    run("minisign", "-S", "-s", tmp_path / "key", "-m", edits, "-x", tmp_path / "edits.minisig")
    signed = Signed(tmp_path / "edits.minisig", tmp_path / "key.pub")
    assert len(Admission(signed=signed).read(edits).numbered) == 1
    edits.write_bytes(CONTENT + b"\n")
    assert "minisign: " in refusal(signed, edits)


def test_without_a_signature_asked_for_none_is_needed(edits: Path) -> None:
    assert len(Admission().read(edits).numbered) == 1
    with pytest.raises(EditFileError, match="no such file"):
        Admission(signed=Signed(edits, edits)).read(edits.parent / "nowhere")
