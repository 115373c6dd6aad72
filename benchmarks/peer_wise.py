"""The paper's method by its authors' own code and by this package: same records, model, layer, seed and measure.

    git clone https://github.com/zjunlp/EasyEdit
    python benchmarks/peer_wise.py --easyedit EasyEdit --model MODEL --data zsre_mend_edit.json \
        --unrelated zsre_mend_train_loc.json --edits 10,30,100 --layer 25 --keep KEEP

EasyEdit's own files run; none of them is copied. Its settings are those for llama-7b, with nothing changed but the
device, model and layer. With every edit both get the same unrelated text. All edited models answer
one prompt at a time, with the right tokens before each token of the answer, and greedily in WILD's form (``--wild``).
A prompt and its answer are read in one pass, as the authors' code measures: a router of means then sees the answer.
With ``--steps`` the prompt is read alone and the answer token by token, as in a chat; and so are the package's defaults
always, which decide where a prompt ends.
Intervals hold 95 % of means over resampled records.

Of several numbers of edits each continues the one before: both sides edit one after the other and look at no later
edit, so the first 10 of 30 are what 10 are. Nothing is merged on the way, as the authors' settings merge after 1,000.
What is done is kept in ``--keep``, and an interrupted run goes on from there. With ``--shards`` the one number of edits
is split into as many side memories on both sides, which are then chosen between (``--mode retrieve``, WISE-Retrieve) or
made one by TIES with the authors' density (``--mode merge``, WISE-Merge).

A seed is that of the mask. Each of several (``--seeds 0,1,2``) has a row, and so has their mean, whose interval
is of seeds and records resampled. Below stands what the preset's figures have more than the code's from seed to seed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peer_easyedit import Edited, Measure, Peer, PeerSequence, Watched, greedy
from rich.console import Console
from rich.table import Table
from runner import run, write_lines

from wisecli.bench.result_row import interval
from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings, resolve
from wisecli.data.corpus import unrelated_texts
from wisecli.editing.run import shard_writer
from wisecli.editing.writers.edit_pass import EditPass
from wisecli.editing.writers.paper_sgd import write_sequential
from wisecli.editing.writers.writer_task import Progress, WriterTask, Written
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import attach

TITLES = {"peer": "authors' code", "paper": "--preset paper", "defaults": "defaults"}
_RESAMPLES = 1000
_DENSITY = 0.53  # that of the authors' settings, of entries that trimming keeps


@dataclass(frozen=True)
class Row:
    """What was measured of one way after so many edits with one seed, with values record by record."""

    way: str
    edits: int
    seed: int
    threshold: float
    seconds: float
    values: dict[str, list[float]]


def by_peer(sequence: PeerSequence, keep: Path, edits: Sequence[Edit], texts: Sequence[str]) -> tuple[Edited, float]:
    """The authors' code."""
    state, told = keep / "peer.pt", keep / "peer.json"
    if sequence.editor is None and told.exists():
        done, sequence.seconds = json.loads(told.read_text(encoding="utf-8"))
        if done <= len(edits):
            sequence.load(state, done)

    def save() -> None:
        sequence.save(state)
        told.write_text(json.dumps([sequence.done, sequence.seconds]), encoding="utf-8")

    sequence.train(edits, texts, after_each=save)
    watched = Watched(sequence.adapter, sequence.adapter.original_layer.weight)
    generate = lambda ids: greedy(sequence.model, ids)  # noqa: E731
    means = [*sequence.adapter.memory_mean_act, sequence.adapter.editing_mean_act]
    threshold = min(mean.min_act() for mean in means) * sequence.hyperparameters.act_ratio
    return Edited(sequence.editor, generate, watched, threshold), statistics.fmean(sequence.seconds or [math.nan])


@contextmanager
def going_on(file: Path, after_each: Callable[[int], None]) -> Iterator[None]:
    """The paper's writer goes on from what it wrote of the same edits before, and keeps each edit that it writes.

    ``after_each`` is then told how many there are.
    """

    def write(task: WriterTask, passes: Sequence[EditPass], on_pass: Callable[[Progress], None]) -> Written:
        written = torch.load(file, weights_only=False) if file.exists() else None
        if written is not None and len(written.losses) > len(passes):  # of more edits than are asked for
            written = None
        done = 0 if written is None else len(written.losses)
        for end in range(done + 1, len(passes) + 1):
            written = write_sequential(task, passes[:end], on_pass, start=written)
            torch.save(replace(written, calls=dict(written.calls)), file)
            after_each(end)
        return write_sequential(task, passes, on_pass, start=written)

    with patch.object(shard_writer, "write_sequential", write):
        yield


def by_package(
    arguments: argparse.Namespace, edits: Sequence[Edit], work: Path, merging: MergeSettings, **flags: Any
) -> Edited:
    """``wise edit`` and ``wise merge`` with some flags."""
    file = write_lines(work / "edits.jsonl", [record.as_dict() for record in edits])
    settings = resolve(EditSettings, flags, section="edit")
    edit(str(arguments.model), file, work / "shards", settings)
    merge([work / "shards"], work / "memory", merging)
    edited = attach(work / "memory")
    model = edited.model
    watched = Watched(edited.routed, edited.routed.get_parameter("weight"))
    return Edited(model, lambda ids: greedy(model, ids), watched, min(edited.routed.thresholds))


class Runner:
    """Edits and measures in every way after every number of edits, but for what an earlier run did."""

    def __init__(self, arguments: argparse.Namespace, edits: Sequence[Edit], texts: Sequence[str], keep: Path) -> None:
        self.arguments, self.edits, self.texts, self.keep = arguments, edits, texts, keep
        self.measure = Measure(arguments)
        self.sequence: PeerSequence | None = None
        keep.mkdir(parents=True, exist_ok=True)

    def row(self, way: str, count: int) -> Row:
        """One line of the table."""
        steps = self.arguments.steps or way == "defaults"
        file = self.keep / f"{way}-{count}{'-steps' if steps else ''}.json"
        if file.exists():
            return Row(**json.loads(file.read_text(encoding="utf-8")))
        edited, seconds = self._peer(count) if way == "peer" else self._package(way, count)
        values = self.measure.of(edited, self.edits[:count], steps=steps)
        row = Row(way, count, self.arguments.seed, edited.threshold, seconds, values)
        file.write_text(json.dumps(asdict(row)), encoding="utf-8")
        print(_line(row), file=sys.stderr, flush=True)
        return row

    def _peer(self, count: int) -> tuple[Edited, float]:
        if self.sequence is None:
            peer = Peer(self.arguments.easyedit)
            settings = peer.hyperparameters(self.arguments, **self._shards(count))
            self.sequence = PeerSequence(peer, self.arguments, settings, as_is=self.arguments.as_is)
        return by_peer(self.sequence, self.keep, self.edits[:count], self.texts[:count])

    def _shards(self, count: int) -> dict[str, Any]:
        """The authors' settings for as many side memories."""
        shards = self.arguments.shards
        if shards == 1:
            return {}
        retrieve, each = self.arguments.mode == "retrieve", count // shards
        return {"retrieve": retrieve, "save_freq": each, "merge_freq": 1000 * count if retrieve else count}

    def _package(self, way: str, count: int) -> tuple[Edited, float]:
        """Seconds of a sequence that goes on from an earlier one are what it took beyond that, by the edits beyond."""
        paper, spent = way == "paper", self.keep / "paper.json"
        flags: dict[str, Any] = {"seed": self.arguments.seed}
        merging = MergeSettings()
        if paper:
            flags |= {"preset": "paper", "layer": str(self.arguments.layer), "shards": self.arguments.shards}
            merging = MergeSettings(mode=self.arguments.mode, density=_DENSITY)
        done, started = 0, time.process_time()
        if paper and spent.exists():
            done, taken = json.loads(spent.read_text(encoding="utf-8"))
            started -= taken

        def note(edits: int) -> None:
            if paper:
                spent.write_text(json.dumps([edits, time.process_time() - started]), encoding="utf-8")

        whole = nullcontext() if self.arguments.shards > 1 else going_on(self.keep / "paper.pt", note)
        with TemporaryDirectory() as work, whole:
            edited = by_package(self.arguments, self.edits[:count], Path(work), merging, **flags)
        seconds = time.process_time() - started
        note(count)
        return edited, seconds / max(count, done)


def _line(row: Row) -> str:
    means = ", ".join(f"{name} {statistics.fmean(values):.3f}" for name, values in row.values.items())
    return f"{TITLES[row.way]}, {row.edits} edits, seed {row.seed}: {means}; {row.seconds:.1f} s an edit"


def printed(rows: Sequence[Row], title: str) -> Table:
    """The table: below the rows of several seeds that of all."""
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    table = Table("edits", "way", "seed", *columns, "threshold", "CPU s an edit", title=title)
    for edits, way in dict.fromkeys((row.edits, row.way) for row in rows):
        alike = [row for row in rows if (row.edits, row.way) == (edits, way)]
        for some in [*([row] for row in alike), *([alike] if len(alike) > 1 else [])]:
            seed = str(some[0].seed) if len(some) == 1 else "all"
            cells = [_cell([row.values[column] for row in some]) for column in columns]
            threshold = statistics.fmean(row.threshold for row in some)
            seconds = statistics.fmean([row.seconds for row in some if not math.isnan(row.seconds)] or [math.nan])
            table.add_row(str(edits), TITLES[way], seed, *cells, f"{threshold:.1f}", f"{seconds:.1f}")
    return table


def _cell(groups: Sequence[Sequence[float]]) -> str:
    """The mean of each seed's values, with a bootstrap interval (95 %)."""
    low, high = interval(groups[0], resamples=_RESAMPLES, seed=0) if len(groups) == 1 else _of_seeds(groups)
    return f"{statistics.fmean(map(statistics.fmean, groups)):.3f} ({low:.2f}–{high:.2f})"


def _of_seeds(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentiles of means over seeds, drawn anew, and over records, drawn anew and the same for every seed."""
    chance, values = np.random.default_rng(0), np.array(groups)
    seeds, records = (chance.integers(size, size=(_RESAMPLES, size)) for size in values.shape)
    means = values[seeds[:, :, None], records[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def differences(rows: Sequence[Row]) -> Table | None:
    """How much more the preset's figures are than the code's, mean and standard error over seeds; None for one seed."""
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    table = Table("edits", *columns, "threshold", title="--preset paper less authors' code, ± standard error of seeds")
    by_point = {(row.edits, row.way, row.seed): row for row in rows}
    for edits in dict.fromkeys(row.edits for row in rows):
        seeds = [seed for count, way, seed in by_point if (count, way) == (edits, "paper")]
        pairs = [
            (by_point[edits, "paper", seed], by_point[edits, "peer", seed])
            for seed in seeds
            if (edits, "peer", seed) in by_point
        ]
        if len(pairs) > 1:
            apart = [
                [statistics.fmean(ours.values[name]) - statistics.fmean(theirs.values[name]) for ours, theirs in pairs]
                for name in columns
            ]
            apart.append([ours.threshold - theirs.threshold for ours, theirs in pairs])
            cells = [f"{statistics.fmean(one):.3f} ±{statistics.stdev(one) / len(one) ** 0.5:.3f}" for one in apart]
            table.add_row(str(edits), *cells)
    return table if table.rows else None


def compare(arguments: argparse.Namespace) -> None:
    """Edit and measure by both, and print a table."""
    arguments.counts = counts = [int(count) for count in arguments.edits.split(",")]
    if arguments.shards > 1 and (len(counts) > 1 or counts[0] % arguments.shards):
        raise SystemExit("--shards splits a single number of edits, into parts of one size")
    edits = [one for one in read_edits(arguments.data) if one.rephrases][arguments.skip :][: counts[-1]]
    if arguments.unrelated:
        listed = json.loads(arguments.unrelated.read_text(encoding="utf-8"))[arguments.skip :]
        texts = [f"{one['loc']} {one.get('loc_ans', '')}".strip() for one in listed[: len(edits)]]
    else:
        texts = random.Random(0).sample(unrelated_texts(max(400, len(edits)), seed=0), len(edits))
    edits = [replace(one, irrelevant=(text,)) for one, text in zip(edits, texts, strict=True)]
    rows: list[Row] = []
    with TemporaryDirectory() as nowhere:
        for seed in map(int, arguments.seeds.split(",")):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            own = argparse.Namespace(**vars(arguments), seed=seed)
            runner = Runner(own, edits, texts, (arguments.keep or Path(nowhere)) / f"seed-{seed}")
            rows += [runner.row(way, count) for count in counts for way in arguments.only.split(",")]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    tables = printed(rows, f"layer {arguments.layer}, records from {arguments.skip}"), differences(rows)
    Console(width=190).print(*(table for table in tables if table))


def compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--easyedit", type=Path, required=True, help="a checkout of EasyEdit")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unrelated", type=Path, help="records with `loc` and `loc_ans`; packaged texts by default")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many records")
    parser.add_argument("--edits", default="10", help="numbers of edits, with commas between, each more than the last")
    parser.add_argument("--layer", type=int, default=25)
    parser.add_argument("--seeds", default="0", help="with commas between")
    parser.add_argument("--shards", type=int, default=1, help="side memories, for a single number of edits")
    parser.add_argument("--mode", choices=("merge", "retrieve"), default="merge", help="what is done with them")
    parser.add_argument("--only", default="peer,paper,defaults", help="some of these, with commas between")
    parser.add_argument("--wild", action="store_true", help="measure answers in WILD's form besides")
    parser.add_argument("--steps", action="store_true", help="read a prompt alone, and its answer token by token")
    parser.add_argument("--as-is", type=int, help="time only so many edits of the authors' code, and hurry the others")
    parser.add_argument("--keep", type=Path, help="a directory of this run alone; what is in it is not done again")


if __name__ == "__main__":
    run(__doc__, {"compare": (compare, compare_options)})
