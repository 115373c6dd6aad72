"""Options that several commands share, and texts of options → values. Nothing here imports torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wisecli.config import LoadOptions, defaults
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.edits.admission import Gate

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", re.IGNORECASE)


def setting(kind: type[Any], name: str, text: str, *flags: str, none: str = "") -> Any:
    """An option for a setting: its default is the settings class's own, or what ``none`` says it stands for."""
    default = defaults(kind)[name]
    return typer.Option(*flags, help=text, show_default=none if default is None else str(default).lower())


Output = Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")]
Model = Annotated[str | None, typer.Option("--model", help="Base model, if not where the manifest says.")]
Memory = Annotated[Path | None, typer.Option("--memory", help="Memory or exported directory.", show_default="memory")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", show_default="0")]
Config = Annotated[Path | None, typer.Option("--config", help="Settings file (TOML), a table a command.")]
Budget = Annotated[
    str | None,
    typer.Option(help="Such as 6GiB; of a larger model layers are read as they run.", show_default="the device's"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan; load no weights, write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for the memory's log.", show_default=False)]
Who = Annotated[str | None, typer.Option("--who", help="By whom, for the memory's log.", show_default="the user")]
OnConflict = Annotated[
    Literal["error", "latest", "skip"] | None,
    typer.Option(
        help="Edits that cannot all hold: refuse them, or let the latest or the first count.",
        show_default="error, but where only a rephrase says so",
    ),
]
SkipKnown = Annotated[bool, typer.Option("--skip-known", help="Leave out what the unedited model says already.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="Rules (TOML) on what may be edited at all.")]
Signature = Annotated[
    Path | None, typer.Option("--verify-signature", help="Signature of EDITS, by minisign or ssh-keygen -Y sign.")
]
Signer = Annotated[Path | None, typer.Option(help="Its public key, or the file of allowed signers.")]
Identity = Annotated[
    str | None, typer.Option("--signer-identity", help="Which of the allowed signers must have signed.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the base model's own code run.")]


def gate_of(
    on_conflict: Literal["error", "latest", "skip"] | None,
    skip_known: bool,
    policy: Path | None,
    signature: Path | None,
    signer: Path | None,
    identity: str | None,
) -> Gate:
    """What is asked of edits before they are trained.

    Raises:
        SettingsError: the policy cannot be used, or of signature and signer one is missing.
    """
    from wisecli.edits.admission import Gate
    from wisecli.edits.policy import read_policy
    from wisecli.edits.signatures import Signed

    if (signature is None) != (signer is None) or (identity is not None and signature is None):
        raise SettingsError("--verify-signature and --signer go together, and --signer-identity with both")
    signed = Signed(signature, signer, identity) if signature is not None and signer is not None else None
    return Gate(on_conflict, None if policy is None else read_policy(policy), signed, skip_known)


def load_options(
    device: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_budget: str | None = None,
    revision: str | None = None,
) -> LoadOptions:
    """How a model is loaded, from the flags of a command.

    Raises:
        SettingsError: the budget is no size.
    """
    return LoadOptions(device, dtype, trust_remote_code, size_in_bytes(memory_budget, "--memory-budget"), revision)


def size_in_bytes(text: str | None, flag: str) -> int | None:
    """A size such as ``2GB`` or ``6GiB``.

    Raises:
        SettingsError: it is none.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    size = (
        round(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    )
    if size < 1:
        raise SettingsError(f"{flag} must be a size such as 500MB or 6GiB, not {text!r}")
    return size


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between.

    Raises:
        SettingsError: they are none.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--weights must be numbers with commas between, not {text!r}") from None


def part_in(text: str | None) -> tuple[int, int]:
    """Which part of how many, such as ``3/8``; without a text the whole.

    Raises:
        SettingsError: it is no such thing.
    """
    if text is None:
        return 1, 1
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise SettingsError(f"--only must look like 3/8, the third of eight parts, not {text!r}")
    return part, parts


def gates_in(text: str | None) -> dict[str, float]:
    """Figures and what they must reach, such as ``reliability=.9,locality=.95``.

    Raises:
        SettingsError: the text is no such list.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")] if text else []
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise SettingsError(f"--fail-under must look like reliability=.9,locality=.95, not {text!r}") from None
