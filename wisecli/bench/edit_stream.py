"""The stream of edits that methods and studies are given: the first records of a dataset, or of several in turn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from wisecli.commands.measure.evaluate import read_dataset
from wisecli.edits.record import Edit
from wisecli.errors import SettingsError
from wisecli.io.digest import sha256_json


@dataclass(frozen=True)
class Stream:
    """Records to edit with, and the dataset each is of; ``rest`` are those that no number of edits reaches.

    ``digest`` tells these datasets' records from any others.
    """

    dataset: str
    tested: Sequence[Edit]
    domains: Sequence[str]
    rest: Sequence[Edit]
    digest: str


def stream_of(dataset: str | None, data: Sequence[Path], most: int) -> Stream:
    """Return the first ``most`` records of the datasets, a record of each in turn.

    Args:
        dataset: their names, with commas between.
        data: their files, in the order of their names, instead of fetching them.

    Raises:
        SettingsError: there are too few records, or not as many files as datasets.
    """
    sources = _sources(dataset, data)
    name, records = ",".join(name for name, _ in sources), [edit for _, edits in sources for edit in edits]
    if most > len(records):
        raise SettingsError(f"--edits {most}: {name} has only {len(records)} records")
    turns = _turns(sources)
    domains, edits = [name for name, _ in turns], [edit for _, edit in turns]
    return Stream(name, edits[:most], domains[:most], edits[most:], digest_of(records))


def digest_of(records: Sequence[Edit]) -> str:
    """Return a digest of records."""
    return sha256_json([record.as_dict() for record in records])[:12]


def counts_in(text: str) -> list[int]:
    """Return numbers of edits with commas between, in rising order.

    Raises:
        SettingsError: they are none.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise SettingsError(f"--edits must be numbers with commas between, as 10,100, not {text!r}")
    return counts


def _sources(dataset: str | None, data: Sequence[Path]) -> list[tuple[str, Sequence[Edit]]]:
    """Return names and records of the datasets, without consequences of edits, which not every method is taught.

    Raises:
        SettingsError: there are more names than one, and not as many files.
    """
    names = dataset.split(",") if dataset else [None] * max(1, len(data))
    if data and len(data) != len(names):
        raise SettingsError(f"--data is given {len(data)} times for {len(names)} datasets; give one file for each")
    files: Sequence[Path | None] = data or [None] * len(names)
    read = (read_dataset(name, file) for name, file in zip(names, files, strict=True))
    return [(name, [edit for edit in edits if edit.consequence_of is None]) for name, edits in read]


def _turns(sources: Sequence[tuple[str, Sequence[Edit]]]) -> list[tuple[str, Edit]]:
    """Return records with their dataset's name, one of each dataset in turn while it has any; where there are several
    datasets, ids bear their names.
    """
    if len(sources) > 1:
        sources = [(name, [replace(edit, id=f"{name}/{edit.id}") for edit in edits]) for name, edits in sources]
    named = [[(name, edit) for edit in edits] for name, edits in sources]
    return [edit for turn in zip_longest(*named) for edit in turn if edit is not None]
