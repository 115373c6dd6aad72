"""How `wise edit` runs, apart from what is trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """How shards are written.

    ``executor`` is ``local``, or ``ray`` or ``ray://address`` for tasks on a Ray cluster. ``only``, as ``(k, n)``,
    writes the k-th of n parts of the shards; whoever writes the last one finishes the output. ``force`` replaces an
    output that is there. ``strict`` raises if an edit did not take; nothing is written then. ``dry_run`` checks
    everything and plans, but loads no weights and writes nothing.
    """

    executor: str = "local"
    only: tuple[int, int] = (1, 1)
    force: bool = False
    strict: bool = False
    dry_run: bool = False
