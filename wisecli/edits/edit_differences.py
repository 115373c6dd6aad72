"""In what two lists of edits differ."""

from collections.abc import Sequence

from wisecli.edits.record import Edit


def describe_differences(before: Sequence[Edit], now: Sequence[Edit]) -> list[str]:
    """Return how edits differ from former ones: a list of one phrase, empty if they are the same."""
    if tuple(before) == tuple(now):
        return []
    old, new = ({edit.id: edit for edit in edits} for edits in (before, now))
    for what, names in (
        ("gone", [name for name in old if name not in new]),
        ("new", [name for name in new if name not in old]),
        ("other", [name for name in new if name in old and new[name] != old[name]]),
    ):
        if names:
            return [f"of the edits {len(names)} are {what}, the first of them {names[0]!r}"]
    return ["the edits come in another order"]
