"""The paper's method by its authors' own code and by this package: same records, model, layer, seed and measure.

    git clone https://github.com/zjunlp/EasyEdit
    python benchmarks/peer_wise.py --easyedit EasyEdit --model MODEL --data zsre_mend_edit.json \
        --unrelated zsre_mend_train_loc.json --edits 30 --layer 25
    python benchmarks/peer_wise.py --easyedit EasyEdit --model MODEL --data zsre_mend_edit.json --steps 5

EasyEdit's own files run; none of them is copied. Its settings are those for llama-7b, with nothing changed but the
device, model and layer. With every edit both get the same unrelated text. All edited models answer
one prompt at a time, with the right tokens before each token of the answer, and greedily in WILD's form. Intervals
hold 95 % of means over resampled records.

With ``--steps`` the losses of the first steps are compared instead: one edit, no margins, every weight free.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonlines
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from wisecli.artifacts.shard import random_mask
from wisecli.bench.row import interval
from wisecli.commands.edit import edit
from wisecli.commands.merge import merge
from wisecli.config import EditSettings, LoadOptions, MergeSettings, resolve
from wisecli.data.corpus import unrelated_texts
from wisecli.editing.one_by_one import write_one_by_one
from wisecli.editing.task import Task
from wisecli.editing.training_examples import capture_groups
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import attach
from wisecli.evaluation.wild import MAX_NEW_TOKENS, WILD, normalized, stop_tokens
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.loading import load_model
from wisecli.models.site import find_site
from wisecli.models.tokenization import encode

COLUMNS = ("reliability", "generalization", "locality", "WILD as taught", "WILD rephrased")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Edited:
    """An edited model: what it answers token by token, and in its own words."""

    tokens: Callable[[Sequence[int], Sequence[int]], Tensor]
    generate: Callable[[Tensor], Tensor]


class Peer:
    """EasyEdit's files, run where they are; the package's own ``__init__`` would import all of its methods."""

    def __init__(self, checkout: Path) -> None:
        for name in ("easyeditor", "easyeditor.models", "easyeditor.util"):
            package = types.ModuleType(name)
            package.__path__ = [str(checkout / name.replace(".", "/"))]
            sys.modules[name] = package
        self.wise: Any = importlib.import_module("easyeditor.models.wise")
        self.code: Any = importlib.import_module("easyeditor.models.wise.WISE")
        self.utils: Any = importlib.import_module("easyeditor.models.wise.utils")
        self.settings = checkout / "hparams/WISE/llama-7b.yaml"

    def hyperparameters(self, arguments: argparse.Namespace, **changes: Any) -> Any:
        """Those of llama-7b for another model and layer."""
        found = self.wise.WISEHyperParams.from_hparams(str(self.settings))
        found.device, found.model_name, found.sequential_edit = "cpu", str(arguments.model), True
        found.inner_params = [f"model.layers[{arguments.layer}].mlp.down_proj.weight"]
        for name, value in changes.items():
            setattr(found, name, value)
        return found

    def train(
        self, arguments: argparse.Namespace, edits: Sequence[Edit], texts: Sequence[str], hyperparameters: Any
    ) -> tuple[Any, list[float]]:
        """The edited model, and every loss of the target that was printed on the way."""
        tokenizer, model = tokenizer_of(arguments.model), base_model(arguments.model)
        losses = []
        editor = None
        for record, text in zip(edits, texts, strict=True):
            request = {"prompt": record.prompt, "target_new": record.target, "loc_prompt": text}
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                editor, _ = self.wise.apply_wise_to_model(model, tokenizer, [request], hyperparameters)
            told = [line for line in printed.getvalue().splitlines() if line.startswith("loss ")]
            losses += [float(line.split("=")[1].split("+")[0]) for line in told]
            print(f"{record.id}: {told[-1]} after {len(told)} steps", file=sys.stderr, flush=True)
        return editor, losses


def tokenizer_of(model: Path) -> PreTrainedTokenizerBase:
    """Padded on the left, as EasyEdit pads for models of this kind."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "left"
    return tokenizer


def base_model(model: Path) -> Any:
    """In float32, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def by_peer(peer: Peer, arguments: argparse.Namespace, edits: Sequence[Edit], texts: Sequence[str]) -> Edited:
    """The authors' code; it decides anew in every pass, and so is asked in one."""
    editor, _ = peer.train(arguments, edits, texts, peer.hyperparameters(arguments))

    def tokens(prompt: Sequence[int], target: Sequence[int]) -> Tensor:
        logits: Tensor = editor(input_ids=torch.tensor([[*prompt, *target]])).logits
        return logits[0, len(prompt) - 1 : -1].argmax(-1)

    return Edited(tokens, lambda ids: greedy(editor.model, ids))


def by_package(arguments: argparse.Namespace, edits: Sequence[Edit], work: Path, **flags: Any) -> Edited:
    """``wise edit`` and ``wise merge`` with some flags."""
    file = work / "edits.jsonl"
    with jsonlines.open(file, "w") as writer:
        writer.write_all(record.as_dict() for record in edits)
    settings = resolve(EditSettings, flags, section="edit")
    edit(str(arguments.model), file, work / "shards", settings)
    merge([work / "shards"], work / "memory", MergeSettings())
    model = attach(work / "memory").model

    def tokens(prompt: Sequence[int], target: Sequence[int]) -> Tensor:
        cache, found = DynamicCache(config=model.config), []
        for part in (list(prompt), *([token] for token in target[:-1])):
            found.append(model(torch.tensor([part]), past_key_values=cache).logits[0, -1].argmax(-1))
        return torch.stack(found)

    return Edited(tokens, lambda ids: greedy(model, ids))


def greedy(model: Any, ids: Tensor) -> Tensor:
    """What a model says after a prompt (1, t), of 50 tokens at most."""
    said: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return said[0, ids.shape[1] :]


class Measure:
    """Figures of an edited model on records."""

    def __init__(self, arguments: argparse.Namespace, edits: Sequence[Edit]) -> None:
        self.tokenizer, self.base, self.edits = tokenizer_of(arguments.model), base_model(arguments.model), edits
        self.stops = stop_tokens(self.tokenizer)

    @torch.no_grad()
    def of(self, edited: Edited) -> dict[str, list[float]]:
        """Each figure's values, record by record."""
        found: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for record in self.edits:
            rephrase = record.rephrases[0]
            for name, prompt in (("reliability", record.prompt), ("generalization", rephrase)):
                row = encode(self.tokenizer, prompt, record.target)
                found[name].append(_share(edited.tokens(row.prompt, row.target), torch.tensor(row.target)))
            for name, prompt in (("WILD as taught", record.prompt), ("WILD rephrased", rephrase)):
                found[name].append(float(self.said(edited, prompt) == normalized(record.target)))
            for probe in record.locality[:1]:
                row = encode(self.tokenizer, probe.prompt, probe.answer or "it")
                ids = torch.tensor([[*row.prompt, *row.target]])
                before = self.base(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].argmax(-1)
                found["locality"].append(_share(edited.tokens(row.prompt, row.target), before))
        return found

    def said(self, edited: Edited, prompt: str) -> str:
        """The greedy answer up to the protocol's end."""
        said = edited.generate(torch.tensor([self.tokenizer(WILD.asked(self.tokenizer, prompt))["input_ids"]])).tolist()
        end = next((place for place, token in enumerate(said) if token in self.stops), len(said))
        return normalized(self.tokenizer.decode(said[:end], skip_special_tokens=True))


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())


def first_steps(peer: Peer, arguments: argparse.Namespace, record: Edit) -> Iterator[tuple[float, float]]:
    """The target's losses in the authors' code and in this package's, step by step, of one bare prompt."""
    free = {"alpha": 1e6, "beta": 0.0, "gamma": -1e6, "mask_ratio": 1.0, "n_iter": arguments.steps + 1}
    peer.utils.CONTEXT_TEMPLATES_CACHE = ["{}"]
    _, theirs = peer.train(arguments, [record], ["The committee met."], peer.hyperparameters(arguments, **free))
    loaded = load_model(arguments.model, LoadOptions(device="cpu"), layers=None)
    site = find_site(arguments.model, Checkpoint(arguments.model), str(arguments.layer))
    settings = resolve(EditSettings, {"preset": "paper", "alpha": 1e6, "beta": 0.0, "gamma": 0.0}, section="edit")
    (batch,) = capture_groups(
        loaded, site, [([(0, record)], [(0, "")], ())], batch_size=1, train_end=False, window=False
    )[0]
    mask = random_mask(site, 1.0, "elements", torch.Generator())
    unrelated = torch.zeros(1, site.d_ff)
    for step in range(arguments.steps):
        task = Task(loaded.model, site, mask, unrelated, 1.0, replace(settings, passes=step + 1))
        yield theirs[step], write_one_by_one(task, [batch], lambda _: None, texts={0: unrelated}).losses[-1]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easyedit", type=Path, required=True, help="a checkout of EasyEdit")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unrelated", type=Path, help="records with `loc` and `loc_ans`; packaged texts by default")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many records")
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--layer", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="some of: peer, paper, defaults; with commas between")
    parser.add_argument("--steps", type=int, help="compare so many first steps instead")
    arguments = parser.parse_args()
    edits = [one for one in read_edits(arguments.data) if one.rephrases][arguments.skip :][: arguments.edits]
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    console = Console(width=150)
    if arguments.steps:
        table = Table("step", "authors' code", "this package", "difference", title="loss of the target")
        for step, (theirs, own) in enumerate(first_steps(Peer(arguments.easyedit), arguments, edits[0])):
            table.add_row(str(step), f"{theirs:.3f}", f"{own:.3f}", f"{abs(theirs - own):.4f}")
        console.print(table)
        return
    if arguments.unrelated:
        listed = json.loads(arguments.unrelated.read_text(encoding="utf-8"))[arguments.skip :]
        texts = [f"{one['loc']} {one.get('loc_ans', '')}".strip() for one in listed[: len(edits)]]
    else:
        texts = random.sample(unrelated_texts(max(400, len(edits)), seed=arguments.seed), len(edits))
    edits = [replace(one, irrelevant=(text,)) for one, text in zip(edits, texts, strict=True)]
    measure = Measure(arguments, edits)
    ways: dict[str, Callable[[Path], Edited]] = {
        "peer": lambda _: by_peer(Peer(arguments.easyedit), arguments, edits, texts),
        "paper": lambda work: by_package(
            arguments, edits, work, preset="paper", layer=str(arguments.layer), seed=arguments.seed
        ),
        "defaults": lambda work: by_package(arguments, edits, work, seed=arguments.seed),
    }
    table = Table("way", *COLUMNS, "s an edit", title=f"{len(edits)} edits, layer {arguments.layer}")
    for name in arguments.only.split(",") if arguments.only else ways:
        with TemporaryDirectory() as work:
            started = time.perf_counter()
            edited = ways[name](Path(work))
            seconds = (time.perf_counter() - started) / len(edits)
            found = measure.of(edited)
        cells = []
        for column in COLUMNS:
            low, high = interval(found[column], resamples=_RESAMPLES, seed=0)
            cells.append(f"{statistics.fmean(found[column]):.3f} ({low:.2f}–{high:.2f})")
        table.add_row({"peer": "authors' code", "paper": "--preset paper"}.get(name, name), *cells, f"{seconds:.1f}")
        console.print(f"{name}: {', '.join(cells)}; {seconds:.1f} s an edit")
    console.print(table)


if __name__ == "__main__":
    main()
