"""Options that several commands share, and texts of options → values. Nothing here imports torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wisecli.cli.choices import DEVICES, DTYPES, forms_named, kinds_named, one_of
from wisecli.cli.parameters import INPUT, INTO, MEASURED, OUTPUT, WHERE, flag, option, setting
from wisecli.config import LoadOptions
from wisecli.errors import SettingsError

if TYPE_CHECKING:
    from wisecli.edits.checks.admission import Admission
    from wisecli.edits.checks.signatures import Signed, SigningKey
    from wisecli.memory.history.release_log import Provenance

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", re.IGNORECASE)


def output_path(text: str | Path) -> Path:
    """Return the directory to write to.

    Raises:
        SettingsError: it is empty, as an unset variable of a shell script is.
    """
    if not str(text).strip():
        raise SettingsError("--output is empty; name a directory")
    return Path(text)


Output = Annotated[Path, typer.Option("-o", "--output", help="Directory to write.", parser=output_path, metavar="DIR")]
Model = Annotated[
    str | None, option("Base model, if not where the manifest says.", "--model", panel=INPUT, metavar="MODEL")
]
Memory = Annotated[Path | None, option("Memory or exported directory.", "--memory", default="memory", metavar="DIR")]
Device = Annotated[
    str, option("auto, cpu, cuda, cuda:N or mps.", "--device", default="auto", metavar="NAME", complete=one_of(DEVICES))
]
Dtype = Annotated[
    str,
    option(
        "auto (the checkpoint's), float32, bfloat16 or float16.",
        "--dtype",
        panel=WHERE,
        default="auto",
        metavar="NAME",
        complete=one_of(DTYPES),
    ),
]
# Flags of version 0.1 that are still taken.
Retired = Annotated[str | None, typer.Option(hidden=True)]
Seed = Annotated[int | None, option("Seed of everything random.", "--seed", panel=INPUT, default="0", metavar="N")]
Config = Annotated[
    Path | None, option("Settings file (TOML), a table a command.", "--config", panel=INPUT, metavar="FILE")
]
Budget = Annotated[
    str | None,
    option(
        "Such as 6GiB; of a larger model layers are read as they run.",
        "--memory-budget",
        panel=WHERE,
        default="the device's",
        metavar="SIZE",
    ),
]
AsJson = Annotated[bool, flag("Print exactly one JSON object on stdout.", "--json")]
Quiet = Annotated[bool, flag("Show no progress on stderr.", "-q", "--quiet", panel=OUTPUT)]
DryRun = Annotated[bool, flag("Check and plan; load no weights, write nothing.", "--dry-run")]
Force = Annotated[bool, flag("Replace an existing output.", "--force", panel=OUTPUT)]
Reason = Annotated[str, option("Why, for the memory's log.", "--reason", panel=INTO)]
Who = Annotated[str | None, option("By whom, for the log.", "--who", panel=INTO, default="the user", metavar="NAME")]
OnConflict = Annotated[
    Literal["error", "latest", "skip"] | None,
    option(
        "Edits that cannot all hold: error refuses them, latest or skip lets the last or the first of them count.",
        "--on-conflict",
        panel=INPUT,
        default="error, but where only a rephrase says so",
        metavar="NAME",
    ),
]
SkipKnown = Annotated[bool, flag("Leave out what the model already says.", "--skip-known", panel=INPUT)]
Derive = Annotated[
    bool, flag("Write what follows by rule as well: other names, the relation asked back.", "--derive", panel=INPUT)
]
PolicyFile = Annotated[
    Path | None, option("Rules (TOML) on what may be edited at all.", "--policy", panel=INPUT, metavar="FILE")
]
Signature = Annotated[
    Path | None,
    option("EDITS' signature: minisign or ssh-keygen -Y.", "--verify-signature", panel=INPUT, metavar="FILE"),
]
Signer = Annotated[
    Path | None, option("The public key, or file of allowed signers.", "--signer", panel=INPUT, metavar="FILE")
]
Identity = Annotated[
    str | None, option("Which allowed signer must have signed.", "--signer-identity", panel=INPUT, metavar="NAME")
]
Sign = Annotated[
    Path | None,
    option("Sign the release with this key of minisign or ssh-keygen.", "--sign", panel=INTO, metavar="KEY"),
]
SealSignature = Annotated[
    Path | None,
    option("SHA256SUMS' signature: minisign or ssh-keygen -Y.", "--verify-signature", panel=INPUT, metavar="FILE"),
]
Trust = Annotated[bool, flag("Let the base model's own code run.", "--trust-remote-code", panel=WHERE)]


def admission_of(
    on_conflict: Literal["error", "latest", "skip"] | None,
    skip_known: bool,
    policy: Path | None,
    signature: Path | None,
    signer: Path | None,
    identity: str | None,
    allow_special: bool = False,
    derive: bool = False,
) -> Admission:
    """Return the checks of edits before they are trained.

    Raises:
        SettingsError: the policy cannot be used, or of signature and signer one is missing.
    """
    from wisecli.edits.checks.admission import Admission

    signed = signed_by(signature, signer, identity)
    rules = None
    if policy is not None:
        from wisecli.edits.checks.policy import read_policy

        rules = read_policy(policy)
    return Admission(on_conflict, rules, signed, skip_known, allow_special, derive)


def signed_by(signature: Path | None, signer: Path | None, identity: str | None) -> Signed | None:
    """Return the signature that is required, if one is.

    Raises:
        SettingsError: of signature and signer one is missing.
    """
    from wisecli.edits.checks.signatures import Signed

    if (signature is None) != (signer is None) or (identity is not None and signature is None):
        raise SettingsError("--verify-signature and --signer go together, and --signer-identity with both")
    return Signed(signature, signer, identity) if signature is not None and signer is not None else None


def provenance_of(who: str | None, reason: str, key: SigningKey | None) -> Provenance:
    """Return who changes a memory, why, and the key that signs it."""
    from wisecli.memory.history.release_log import Provenance

    return Provenance(who, reason, key)


def key_in(path: Path | None) -> SigningKey | None:
    """Return the signing key in a file, if one is given.

    Raises:
        SettingsError: it cannot be used.
    """
    from wisecli.edits.checks.signatures import SigningKey

    return None if path is None else SigningKey(path)


def load_options(
    device: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_budget: str | None = None,
    revision: str | None = None,
) -> LoadOptions:
    """Return how a model is loaded, from the flags of a command.

    Raises:
        SettingsError: the type is unknown, or the budget is no size.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return LoadOptions(device, dtype, trust_remote_code, size_in_bytes(memory_budget, "--memory-budget"), revision)


def size_in_bytes(text: str | None, flag: str) -> int | None:
    """Return the bytes of a size such as ``2GB`` or ``6GiB``.

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
    """Return numbers with commas between.

    Raises:
        SettingsError: they are none.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--weights must be numbers with commas between, not {text!r}") from None


def part_in(text: str | None) -> tuple[int, int]:
    """Return which part of how many a text such as ``3/8`` names; without a text the whole.

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
        raise SettingsError(f"only must look like 3/8, the third of eight parts, not {text!r}")
    return part, parts


def thresholds_in(text: str | None) -> dict[str, float]:
    """Return figures and what they must reach, from a text such as ``reliability=.9,locality=.95``.

    Raises:
        SettingsError: the text is no such list.
    """
    thresholds: dict[str, float] = {}
    try:
        for name, value in (part.split("=") for part in text.split(",")) if text else ():
            # What is no number would never be missed, and of a figure that is named twice one would go by unseen.
            if not math.isfinite(float(value)) or name.strip() in thresholds:
                raise ValueError(text)
            thresholds[name.strip()] = float(value)
    except ValueError:
        raise SettingsError(
            f"--fail-under must look like reliability=.9,locality=.95, each figure once, not {text!r}"
        ) from None
    return thresholds


def protocol_of(kind: type[Any]) -> Any:
    """Return the option ``--protocol`` of a command with these settings."""
    text = "Answers that are generated: forms, wild (arXiv 2502.11177), both as forms,wild, or teacher for none."
    return setting(kind, "protocol", text, panel=MEASURED)


def forms_of(kind: type[Any]) -> Any:
    """Return the option ``--forms`` of a command with these settings."""
    text = "Forms to ask in: all, trained, unseen, none, or names with commas between."
    return setting(kind, "forms", text, panel=MEASURED, metavar="NAME", complete=forms_named)


def kinds_of(kind: type[Any]) -> Any:
    """Return the option ``--kinds`` of a command with these settings."""
    text = "Prompts around an edit: all, those that ask it (asked) or mention it (mentioned), none, or names."
    return setting(kind, "kinds", text, panel=MEASURED, metavar="NAME", complete=kinds_named)


def ask_of(kind: type[Any]) -> Any:
    """Return the option ``--ask`` of a command with these settings."""
    return setting(kind, "ask", "How many of the edits are asked in the forms and kinds.", panel=MEASURED)
