"""Whether a file was signed, and signing one, by ``minisign`` or ``ssh-keygen``; nothing here knows of cryptography."""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wisecli.errors import SettingsError, SignatureError

# What a signature must be made for with `ssh-keygen -Y sign -n`, so that none made for anything else counts.
NAMESPACE = "wise"
_SSH = b"-----BEGIN SSH SIGNATURE-----"
_MINISIGN = b"untrusted comment:"
# A signature takes less than a kilobyte, and its check less than a second.
_LONGEST, _PATIENCE = 1 << 16, 60
_SSH_KEYS = (b"-----BEGIN OPENSSH PRIVATE KEY-----", b"ssh-", b"ecdsa-", b"sk-")


@dataclass(frozen=True)
class Signed:
    """A signature that must hold.

    Args:
        signature: what ``minisign -S`` or ``ssh-keygen -Y sign -n wise`` wrote.
        signer: minisign's public key, or the file of allowed signers of ``ssh-keygen``.
        identity: who must have signed, as the file of allowed signers names them; minisign knows of none.
    """

    signature: Path
    signer: Path
    identity: str | None = None

    def require(self, path: Path, content: bytes) -> None:
        """Check that the signature is of these bytes. Whatever prevents the check counts as a failure.

        Args:
            path: where the bytes are from.

        Raises:
            SignatureError: it is not, or that cannot be found out.
            SettingsError: an SSH signature without an identity, or the other way round.
        """
        try:
            with self.signature.open("rb") as stream:
                start = stream.read(_LONGEST)
        except OSError as error:
            raise SignatureError(path, f"the signature cannot be read ({error})") from None
        if start.lstrip().startswith(_SSH):
            self._require_identity(wanted=True)
            self._ssh(path, content)
        elif start.lstrip().startswith(_MINISIGN):
            self._require_identity(wanted=False)
            self._minisign(path, content)
        else:
            raise SignatureError(path, f"{self.signature} is a signature neither of minisign nor of ssh-keygen")

    def _require_identity(self, *, wanted: bool) -> None:
        if wanted and not self.identity:
            raise SettingsError(f"{self.signature} is an SSH signature; name its signer with --signer-identity")
        if self.identity and not wanted:
            raise SettingsError(f"{self.signature} is of minisign, which knows no identities; drop --signer-identity")

    def _ssh(self, path: Path, content: bytes) -> None:
        given = ["-f", str(self.signer), "-I", self.identity or "", "-n", NAMESPACE, "-s", str(self.signature)]
        self._run(path, ["ssh-keygen", "-Y", "verify", *given], content)

    def _minisign(self, path: Path, content: bytes) -> None:
        """Check a signature with minisign, on a copy that nobody else can change meanwhile: it reads no pipe."""
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / "signed"
            copy.write_bytes(content)
            given = ["-p", str(self.signer), "-x", str(self.signature), "-m", str(copy)]
            self._run(path, ["minisign", "-V", "-q", *given], b"")

    def _run(self, path: Path, command: list[str], content: bytes) -> None:
        """Run the program that checks a signature, with ``content`` as its input."""
        try:
            # No shell reads it, and each path follows its option, so that none is taken for another.
            done = subprocess.run(  # nosec B603
                command, input=content, capture_output=True, check=False, timeout=_PATIENCE
            )
        except FileNotFoundError:
            raise SignatureError(path, f"{command[0]} is not installed, which {self.signature} needs") from None
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise SignatureError(path, f"{command[0]} cannot be run ({error})") from None
        if done.returncode != 0:
            raise SignatureError(path, f"{self.signature} does not hold for it ({command[0]}: {_reason(done)})")


@dataclass(frozen=True)
class SigningKey:
    """What signs files: a private key of ``minisign`` or ``ssh-keygen``, or the public half of one that an agent holds.

    Raises:
        SettingsError: it is none, or what it needs is not installed.
    """

    path: Path

    def __post_init__(self) -> None:
        if shutil.which(self.tool) is None:
            raise SettingsError(f"--sign {self.path}: {self.tool} is not installed, which this key needs")

    @cached_property
    def tool(self) -> str:
        """Which program signs with it."""
        try:
            with self.path.open("rb") as stream:
                start = stream.read(_LONGEST).lstrip()
        except OSError as error:
            raise SettingsError(f"--sign {self.path}: it cannot be read ({error})") from None
        if start.startswith(_SSH_KEYS):
            return "ssh-keygen"
        if start.startswith(_MINISIGN):
            return "minisign"
        raise SettingsError(f"--sign {self.path}: it is a key neither of minisign nor of ssh-keygen")

    def sign(self, path: Path) -> Path:
        """Sign a file and write the signature beside it, asking for a password if the key has one.

        Raises:
            SettingsError: the program cannot sign with the key.
        """
        if self.tool == "ssh-keygen":
            signature = path.with_name(f"{path.name}.sig")
            command = ["ssh-keygen", "-Y", "sign", "-q", "-f", str(self.path), "-n", NAMESPACE, str(path.absolute())]
        else:
            signature = path.with_name(f"{path.name}.minisig")
            command = ["minisign", "-S", "-s", str(self.path), "-m", str(path), "-x", str(signature)]
        # A password is asked for on stderr, which must then be seen.
        errors = None if sys.stdin is not None and sys.stdin.isatty() else subprocess.PIPE
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, check=False)  # nosec B603 # the same
        if done.returncode != 0 or not signature.is_file():
            raise SettingsError(f"--sign {self.path}: {self.tool} does not sign with it ({_reason(done)})")
        return signature


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return the last line of a program's output."""
    lines = (done.stderr or done.stdout or b"").decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"exit code {done.returncode}"
