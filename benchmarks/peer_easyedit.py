"""The code of the paper's authors, and what it and this package are both measured by.

EasyEdit runs where it is: nothing of it is copied, and nothing of it is changed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
import types
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from wisecli.edits.record import Edit
from wisecli.evaluation.wild import MAX_NEW_TOKENS, WILD, normalized, stop_tokens
from wisecli.models.prompts.tokenization import encode
from wisecli.models.running.forward_pass import CACHE_ARGUMENT

# What the authors' code asks for: so many tokens in each of so many contexts.
_CONTEXTS = [[5, 5], [10, 5]]
# In the labels of tokens that are not to be learnt.
_UNLABELLED = -100
COLUMNS = ("reliability", "generalization", "locality", "routed", "routed rephrased", "routed unrelated")
WILD_COLUMNS = ("WILD as taught", "WILD rephrased")


def tokenizer_of(model: Path) -> PreTrainedTokenizerBase:
    """Padded on the left, as EasyEdit pads for models of this kind, with the end of text if there is nothing for it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_model(model: Path) -> Any:
    """In float32, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


class Peer:
    """EasyEdit's files; the package's own ``__init__`` would import all of its methods."""

    def __init__(self, checkout: Path) -> None:
        for name in ("easyeditor", "easyeditor.models", "easyeditor.util"):
            package = types.ModuleType(name)
            package.__path__ = [str(checkout / name.replace(".", "/"))]
            sys.modules[name] = package
        self.wise: Any = importlib.import_module("easyeditor.models.wise")
        self.code: Any = importlib.import_module("easyeditor.models.wise.WISE")
        self.utils: Any = importlib.import_module("easyeditor.models.wise.utils")
        self.settings = checkout / "hparams/WISE/llama-7b.yaml"

    def hyperparameters(self, arguments: Namespace, **changes: Any) -> Any:
        """Those of llama-7b for another model and layer."""
        found = self.wise.WISEHyperParams.from_hparams(str(self.settings))
        found.device, found.model_name, found.sequential_edit = "cpu", str(arguments.model), True
        found.inner_params = [f"model.layers[{arguments.layer}].mlp.down_proj.weight"]
        for name, value in changes.items():
            setattr(found, name, value)
        return found


class PeerSequence:
    """One model that the authors' code edits, edit after edit.

    ``seconds`` is the processor time of each edit that ran as it is. Edits after the first ``as_is`` are hurried: see
    :class:`Hurried`.
    """

    def __init__(self, peer: Peer, arguments: Namespace, hyperparameters: Any, *, as_is: int | None = None) -> None:
        self.peer, self.hyperparameters, self.as_is = peer, hyperparameters, as_is
        self.tokenizer, self.model = tokenizer_of(arguments.model), base_model(arguments.model)
        # Written once, by the model before any edit: a sequence that goes on later would write others.
        peer.utils.get_context_templates(self.model, self.tokenizer, length_params=_CONTEXTS, device="cpu")
        self.hurried = Hurried(peer.code, self.model, arguments.layer)
        self.editor: Any = None
        self.done, self.seconds, self.losses = 0, list[float](), list[tuple[float, float, float]]()

    def train(
        self, edits: Sequence[Edit], texts: Sequence[str], *, after_each: Callable[[], None] = lambda: None
    ) -> None:
        """Edit with those of a sequence that were not edited with yet."""
        for record, text in list(zip(edits, texts, strict=True))[self.done :]:
            # The code puts a space before a target, where some records have one already: then it would teach two.
            request = {"prompt": record.prompt, "target_new": record.target.lstrip(), "loc_prompt": text}
            printed, started = io.StringIO(), time.process_time()
            whole = self.as_is is None or self.done < self.as_is
            with contextlib.redirect_stdout(printed), contextlib.nullcontext() if whole else self.hurried.of_one_edit():
                self.editor, _ = self.peer.wise.apply_wise_to_model(
                    self.model, self.tokenizer, [request], self.hyperparameters
                )
            if whole:
                self.seconds.append(time.process_time() - started)
            told = [line.removeprefix("loss ") for line in printed.getvalue().splitlines() if line.startswith("loss ")]
            self.losses += [_parts(line) for line in told]
            self.done += 1
            print(f"authors' code, edit {self.done}: {told[-1]}, {len(told)} steps", file=sys.stderr, flush=True)
            after_each()

    @property
    def adapter(self) -> Any:
        """What stands in the edited matrix's place."""
        return self.editor.get_adapter_layer()

    def save(self, file: Path) -> None:
        """Keep what was learnt, by the authors' own function."""
        self.editor.save(str(file))

    def load(self, file: Path, done: int) -> None:
        """Go on from what was kept."""
        self.editor = self.peer.code.WISE(model=self.model, config=self.hyperparameters, device="cpu")
        adapter, kept = self.adapter, torch.load(file, weights_only=False)
        adapter.new_weight.requires_grad = True
        adapter.load_state_dict(kept["adapter_state_dict"])
        for name, value in kept["additional_info"].items():
            setattr(adapter, name, value)
        self.done = done


def _parts(line: str) -> tuple[float, float, float]:
    whole, parts = line.split(" = ")
    target, margins = parts.split(" + ")[:2]
    return float(whole), float(target), float(margins)


class Hurried:
    """Leaves out what changes nothing but the time, while all passes are of the tokens of one edit.

    The layers below the edited one are frozen, and answer from the step before; and only where there is a label are
    there logits.
    """

    def __init__(self, code: Any, model: Any, layer: int) -> None:
        self.on = self.keeping = False
        self.last, self.labels, self.logits = None, None, None
        model.register_forward_pre_hook(self._without_labels, with_kwargs=True)
        *first, last = model.model.layers[:layer]
        for each in first:
            self._wrap(each, keeps=False)
        self._wrap(last, keeps=True)
        head, model.lm_head.forward = model.lm_head.forward, lambda hidden: self._logits(head, hidden)
        whole, code.CrossEntropyLoss = code.CrossEntropyLoss, lambda **how: self._losses(whole(**how))

    def _without_labels(self, _model: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The model would work out a loss of its own from them, which nobody reads. Contexts are written without."""
        self.keeping = self.on and "labels" in named
        self.labels = named.pop("labels") if self.keeping else None
        return rest, named

    def _wrap(self, layer: Any, *, keeps: bool) -> None:
        run = layer.forward

        def forward(hidden: Tensor, *rest: Any, **named: Any) -> Any:
            if self.keeping and self.last is not None:
                return self.last if keeps else hidden
            found = run(hidden, *rest, **named)
            if self.keeping and keeps:
                self.last = found
            return found

        layer.forward = forward

    def _logits(self, head: Any, hidden: Tensor) -> Tensor:
        """Those at labels are kept for the loss; of the others there is nothing but their places (B, T, 1)."""
        if self.labels is None:
            found: Tensor = head(hidden)
            return found
        wanted = F.pad(self.labels[:, 1:], (0, 1), value=_UNLABELLED) != _UNLABELLED
        wanted[-1] = False
        self.logits = head(hidden[wanted])
        return hidden.new_zeros(*wanted.shape, 1)

    def _losses(self, whole: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of each label (n,), nought where there is none."""

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            if self.logits is None:
                return whole(logits, labels)
            (places,) = (labels != _UNLABELLED).nonzero(as_tuple=True)
            found = self.logits.new_zeros(len(labels))
            return found.index_put((places,), whole(self.logits, labels[places]))

        return loss

    @contextlib.contextmanager
    def of_one_edit(self) -> Iterator[None]:
        """While it holds, every pass is of the same tokens."""
        self.on = True
        try:
            yield
        finally:
            self.on = self.keeping = False
            self.last, self.labels, self.logits = None, None, None


@dataclass(frozen=True)
class Edited:
    """An edited model: its passes, what it answers in its own words, and whether its memory answered last.

    ``threshold`` is what a prompt's mean must exceed for that, the lowest of several memories'.
    """

    model: Callable[..., Any]
    generate: Callable[[Tensor], Tensor]
    routed: Callable[[], bool]
    threshold: float


class Watched:
    """Whether a module's output was, in the first pass since this was last asked, other than its own matrix gives."""

    def __init__(self, module: Any, weight: Tensor) -> None:
        self.weight, self.seen = weight, list[bool]()
        module.register_forward_hook(self._look)

    def _look(self, _module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen.append(not torch.equal(output, F.linear(inputs[0], self.weight)))

    def __call__(self) -> bool:
        first, self.seen = self.seen[0], []
        return first


def likeliest(model: Callable[..., Any], prompt: Sequence[int], target: Sequence[int], *, steps: bool) -> Tensor:
    """The likeliest token before each of the target's (t,), read in one pass or, by ``steps``, as it is generated."""
    if not steps:
        logits: Tensor = model(input_ids=torch.tensor([[*prompt, *target]])).logits
        return logits[0, len(prompt) - 1 : -1].argmax(-1)
    cache, found = DynamicCache(), []
    for part in (list(prompt), *([token] for token in target[:-1])):
        found.append(model(input_ids=torch.tensor([part]), **{CACHE_ARGUMENT: cache}).logits[0, -1].argmax(-1))
    return torch.stack(found)


def greedy(model: Any, ids: Tensor) -> Tensor:
    """What a model says after a prompt (1, t), of 50 tokens at most."""
    said: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return said[0, ids.shape[1] :]


class Measure:
    """Figures of an edited model on records."""

    def __init__(self, arguments: Namespace) -> None:
        self.tokenizer, self.base = tokenizer_of(arguments.model), base_model(arguments.model)
        self.stops, self.wild = stop_tokens(self.tokenizer), arguments.wild

    @torch.no_grad()
    def of(self, edited: Edited, edits: Sequence[Edit], *, steps: bool) -> dict[str, list[float]]:
        """Each figure's values, record by record; for ``steps`` see :func:`likeliest`."""
        columns = (*COLUMNS, *WILD_COLUMNS) if self.wild else COLUMNS
        found: dict[str, list[float]] = {name: [] for name in columns}
        for record in edits:
            rephrase = record.rephrases[0]
            for name, routed, prompt in (
                ("reliability", "routed", record.prompt),
                ("generalization", "routed rephrased", rephrase),
            ):
                row = encode(self.tokenizer, prompt, record.target)
                said = likeliest(edited.model, row.prompt, row.target, steps=steps)
                found[name].append(_share(said, torch.tensor(row.target)))
                found[routed].append(float(edited.routed()))
            for probe in record.locality[:1]:
                row = encode(self.tokenizer, probe.prompt, probe.answer or "it")
                ids = torch.tensor([[*row.prompt, *row.target]])
                before = self.base(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].argmax(-1)
                said = likeliest(edited.model, row.prompt, row.target, steps=steps)
                found["locality"].append(_share(said, before))
                found["routed unrelated"].append(float(edited.routed()))
            for name, prompt in zip(WILD_COLUMNS, (record.prompt, rephrase), strict=True) if self.wild else ():
                found[name].append(float(self.said(edited, prompt) == normalized(record.target)))
                edited.routed()
        return found

    def said(self, edited: Edited, prompt: str) -> str:
        """The greedy answer up to the protocol's end."""
        said = edited.generate(
            torch.tensor([self.tokenizer(WILD.render(self.tokenizer, prompt))["input_ids"]])
        ).tolist()
        end = next((place for place, token in enumerate(said) if token in self.stops), len(said))
        return normalized(str(self.tokenizer.decode(said[:end], skip_special_tokens=True)))


def _share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())
