"""Whether a file of edits was signed, as ``minisign`` or ``ssh-keygen`` says; nothing here knows of cryptography."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from wisecli.errors import SettingsError, SignatureError

# What a signature must be made for with `ssh-keygen -Y sign -n`, so that none made for anything else counts.
NAMESPACE = "wise"
_SSH = b"-----BEGIN SSH SIGNATURE-----"
_MINISIGN = b"untrusted comment:"
# A signature takes less than a kilobyte, and its check less than a second.
_LONGEST, _PATIENCE = 1 << 16, 60


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
        """Minisign reads no pipe, and so a copy, which nobody else can change meanwhile."""
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / "edits"
            copy.write_bytes(content)
            given = ["-p", str(self.signer), "-x", str(self.signature), "-m", str(copy)]
            self._run(path, ["minisign", "-V", "-q", *given], b"")

    def _run(self, path: Path, command: list[str], content: bytes) -> None:
        try:
            done = subprocess.run(command, input=content, capture_output=True, check=False, timeout=_PATIENCE)
        except FileNotFoundError:
            raise SignatureError(path, f"{command[0]} is not installed, which {self.signature} needs") from None
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise SignatureError(path, f"{command[0]} cannot be run ({error})") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            reason = said[-1].strip() if said else f"exit code {done.returncode}"
            raise SignatureError(path, f"{self.signature} does not hold for it ({command[0]}: {reason})")
