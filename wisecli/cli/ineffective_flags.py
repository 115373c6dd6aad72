"""Flags that have no effect where they are given: said on stderr, or refused where something would be lost by it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wisecli.config import EditSettings
from wisecli.errors import SettingsError
from wisecli.retired_settings import RETIRED

# Of a command, by the name of its parameter: what counts as not given besides nothing at all.
_UNSET: tuple[Any, ...] = (None, False, "", ())
# Settings of `wise edit` that gradient steps read, those that only steps for one edit after the other do, a closed
# form's, those of a matrix's change, and those of its polishing.
_GRADIENT = "schedule", "passes", "learning_rate", "alpha", "beta", "gamma"
_SEQUENTIAL = "weight_decay", "norm_constraint"
_CLOSED_FORM = "residual_steps", "residual_more", "residual_stop", "polish", "polish_rate"
_MASKS = "mask_ratio", "mask_kind", "masks"
_POLISHING = "polish_rate", "stop_loss"
# Settings of `wise merge` that only matrices are merged by.
_OF_MATRICES = "method", "refit", "density", "scale", "weights", "pooling", "seed"


def of_edit(given: Mapping[str, Any]) -> list[str]:
    """Return sentences on the parameters of ``wise edit``.

    Raises:
        SettingsError: edits would be made that were to be planned, or not be made that were to be followed, or nothing
            would be signed.
    """
    into = given["into"] is not None
    if given["watch_file"] and not into:
        raise SettingsError("--watch follows a file into a memory; name it with --into")
    if given["sign"] is not None and not into:
        raise SettingsError("--sign signs releases of a memory; shards have none, so pass --into, or sign the merge")
    if given["dry_run"] and into:
        raise SettingsError("--dry-run plans shards, and no release of a memory; leave out --into")
    if given["reproduce"] is not None and given["edits"] is not None:
        raise SettingsError("--reproduce writes the edits that its manifest lists; leave out EDITS")
    if into:
        rules = dict.fromkeys(("output", "only", "force", "target_module"), "with --into")
    else:
        rules = dict.fromkeys(("who", "reason"), "without --into")
    if not given["watch_file"]:
        rules["interval"] = "without --watch"
    if given["from_text"] is None:
        rules["yes"] = "without --from-text"
    if given["model"] is not None and Path(given["model"]).exists():
        rules["revision"] = "on files of this disk; it is of a model on the hub"
    return [*retired(given), *_without_effect(given, rules, output=Path("shards"), interval=1.0)]


def of_writing(given: Mapping[str, Any], settings: EditSettings) -> list[str]:
    """Return sentences on settings of ``wise edit`` that the way of writing does not read."""
    if settings.by_facts:
        rules = dict.fromkeys((*_GRADIENT, *_SEQUENTIAL), "without --set writer=gradient")
        if settings.behind_layer:
            rules |= dict.fromkeys(_MASKS, "behind a layer, where no matrix is changed")
        if not settings.polish:
            rules |= dict.fromkeys(_POLISHING, "with --set polish=0")
    else:
        rules = dict.fromkeys(_CLOSED_FORM, "with --set writer=gradient")
        if not settings.sequential:
            rules |= dict.fromkeys(_SEQUENTIAL, "without --set schedule=sequential")
    return list(_without_effect(given, rules))


def of_merge(given: Mapping[str, Any]) -> list[str]:
    """Return sentences on the parameters of ``wise merge``.

    Raises:
        SettingsError: a release would be made that was to be planned.
    """
    into = given["into"] is not None
    if given["dry_run"] and into:
        raise SettingsError("--dry-run plans a memory, and no release of one; leave out --into")
    rules: dict[str, str] = {}
    if into:
        rules = dict.fromkeys(("output", "force"), "with --into")
    elif not given["history"]:
        rules = dict.fromkeys(("who", "reason"), "with --no-history")
    if given["mode"] == "lookup":
        rules |= dict.fromkeys(_OF_MATRICES, "with --mode lookup")
    elif given["mode"] is not None:
        rules |= dict.fromkeys(("subjects", "strength"), f"with --mode {given['mode']}")
    if given["mode"] == "retrieve":
        rules |= dict.fromkeys(("method", "density", "scale", "weights"), "with --mode retrieve")
    kept = ["--no-history has no effect with --into"] if into and not given["history"] else []
    return [*kept, *retired(given), *_without_effect(given, rules, output=Path("memory"))]


def of_export(given: Mapping[str, Any]) -> list[str]:
    """Return sentences on the parameters of ``wise export``."""
    rules = {} if given["card"] else {"metrics": "with --no-model-card"}
    if given["push_to_hub"] is None:
        rules["private"] = "without --push-to-hub"
    if given["form"] == "delta":
        rules |= dict.fromkeys(("link", "dtype", "max_shard_size"), "with --format delta")
    if given["form"] == "gguf":
        rules |= dict.fromkeys(
            ("dtype", "max_shard_size"), "with --format gguf; --quantize says how weights are stored"
        )
    else:
        rules["quantize"] = "without --format gguf"
    return list(_without_effect(given, rules, dtype="auto", quantize="q8_0"))


def of_evaluation(given: Mapping[str, Any]) -> list[str]:
    """Return sentences on the parameters of ``wise eval``."""
    rules = {}
    if given["generate"] is False:
        rules = dict.fromkeys(("max_new_tokens", "protocol", "forms", "kinds", "ask", "before"), "with --no-generate")
    elif given["protocol"] in ("wild", "teacher"):
        rules = dict.fromkeys(("forms", "kinds", "ask"), f"with --protocol {given['protocol']}")
    elif given["forms"] == given["kinds"] == "none":
        rules = {"ask": "with --forms none and --kinds none"}
    if "wild" not in (given["protocol"] or "") and given["generate"] is not False:
        rules["before"] = "without --protocol wild"
    if given["fail_under"] is None:
        rules["if_measured"] = "without --fail-under"
    return list(_without_effect(given, rules))


def retired(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each flag of version 0.1 that is given."""
    for name, instead in RETIRED.items():
        if given.get(name) is not None:
            yield f"--{name} will go: {instead}"


def _without_effect(given: Mapping[str, Any], rules: Mapping[str, str], **unset: Any) -> Iterator[str]:
    """Yield a sentence for each parameter that is given and that a rule says has no effect.

    Args:
        unset: values that count as not given, by parameter.
    """
    for name, where in rules.items():
        if given.get(name) not in (*_UNSET, unset.get(name)):
            yield f"{_written(name, given)} has no effect {where}"


def _written(name: str, given: Mapping[str, Any]) -> str:
    """Return how a parameter is written on a command line: as an option, or by ``--set``."""
    return f"--set {name}={given[name]}" if name in given.get("by_set", ()) else f"--{name.replace('_', '-')}"
