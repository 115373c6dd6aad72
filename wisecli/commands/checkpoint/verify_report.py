"""What ``wise verify`` found."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from wisecli.artifacts.directory_kind import Kind
from wisecli.artifacts.integrity import Check
from wisecli.errors import GateFailedError


@dataclass(frozen=True)
class VerifyReport:
    """Everything that was checked of a directory, in order."""

    path: Path
    kind: Kind | Literal["merged", "stock", "gguf"]
    checks: tuple[Check, ...]

    @property
    def differences(self) -> tuple[Check, ...]:
        """Those checks that failed."""
        return tuple(check for check in self.checks if check.state == "differs")

    def as_json(self) -> dict[str, Any]:
        """Return the one object that ``--json`` prints."""
        named = [asdict(check) for check in self.checks]
        counts = {"checks": len(named), "differences": len(self.differences)}
        return {"results": {"path": str(self.path), "kind": self.kind, **counts, "list": named}, "n-samples": counts}

    def check(self) -> None:
        """Raise if anything differs.

        Raises:
            GateFailedError: saying how many checks failed, and of which files.
        """
        if wrong := self.differences:
            files = ", ".join(dict.fromkeys(check.file for check in wrong))
            raise GateFailedError(f"{self.path}: {len(wrong)} of {len(self.checks)} checks failed, of {files}")
