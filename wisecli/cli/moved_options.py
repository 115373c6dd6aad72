"""Options that went, as they are settings now: still taken, with a warning that says what to write."""

from collections.abc import Sequence

from wisecli.cli.console import Console


def _flags(*names: str, **fixed: str) -> dict[str, str]:
    """Options by their names on a command line → what ``--set`` takes: ``name=``, or ``name=value`` of a plain flag."""
    taken = {f"--{name.replace('_', '-')}": f"{name}=" for name in names}
    return taken | {f"--{name.replace('_', '-')}": value for name, value in fixed.items()}


# By command.
MOVED: dict[str, dict[str, str]] = {
    "edit": _flags(
        *("writer", "schedule", "shards", "edits_per_shard", "mask_ratio", "mask_kind", "masks", "passes"),
        *("learning_rate", "batch_size", "contexts", "augment"),
        *("executor", "only", "interval", "target_module"),
        forms="in_forms=true",
        no_forms="in_forms=false",
        chat="chat=true",
        no_chat="chat=false",
        allow_special_tokens="allow_special_tokens=true",
    ),
    "merge": {
        **_flags("pooling", "threshold", "false_alarm", "subjects", "strength"),
        **_flags(refit="refit=true", no_refit="refit=false"),
        "--lambda": "scale=",
    },
    "eval": _flags("batch_size", before="before=true", no_before="before=false"),
    "bench": _flags("layers", "mask_ratios", "shard_counts", "edits_per_shard", "batch_size"),
}


def taken_as_settings(command: str, arguments: Sequence[str]) -> list[str]:
    """Return a command line with ``--set`` in the place of retired options, and warn of each once."""
    moved, found, warned = MOVED.get(command, {}), [], set()
    rest = iter(arguments)
    for argument in rest:
        name, between, value = argument.partition("=")
        if argument == "--":
            found += [argument, *rest]
        elif name not in moved:
            found.append(argument)
        else:
            text = moved[name]
            if text.endswith("="):
                text += value if between else next(rest, "")
            found += ["--set", text]
            if name not in warned:
                Console().warn([f"{name} will go: write --set {text}"])
            warned.add(name)
    return found
