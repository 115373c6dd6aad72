"""The part of ``wise export`` that fits a gate, writes it as a stock checkpoint, and measures what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wisecli.artifacts.file_names import MERGED
from wisecli.artifacts.memory_manifest import Manifest
from wisecli.config import LoadOptions
from wisecli.data.corpus import texts_beside_gates
from wisecli.edits.record import Edit
from wisecli.environment import versions
from wisecli.export.gguf.gguf_file import GGUF_NAME, Quantization, require_gguf, write_gguf
from wisecli.export.gguf.modelfile import MODELFILE_NAME, modelfile
from wisecli.export.stock.gate_background import background_states
from wisecli.export.stock.gate_fitting import fit_gate
from wisecli.export.stock.gate_states import edit_states
from wisecli.export.stock.stock_checkpoint import Gate, block_count, require_stock, write_stock
from wisecli.export.weights import Packing
from wisecli.io.checkpoint import Checkpoint, write_json
from wisecli.io.digest import sha256_json
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.chat_template import date_of
from wisecli.models.prompts.tokenization import Row, collate, encode, in_batches
from wisecli.models.running.generation import generate
from wisecli.progress import Event, ProgressCallback

_BATCH = 32
# Unrelated texts that shards are made with, unless less is asked for.
_TEXTS = 600
# So many edits are asked, spaced evenly; an answer may be so many tokens longer than the longest target.
_ASKED, _MARGIN = 200, 4


@dataclass(frozen=True)
class Answers:
    """Share of edits whose own prompt, and whose first rephrase, is answered by the target and nothing else, and of
    unrelated tokens after which the next one stays the base model's.
    """

    as_taught: float
    unrelated: float
    rephrased: float | None = None


@dataclass(frozen=True)
class Gated:
    """What became of a memory as a gate: its ``keys`` and ``blocks``, and what it answers ``beside`` the routed form.

    ``edits`` were asked, and ``tokens`` unrelated ones looked at.
    """

    keys: int
    blocks: int
    stock: Answers
    routed: Answers
    edits: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as the manifest keeps it."""
        return asdict(self)


def require_gated(base: Path, site: Site, *, gguf: bool) -> None:
    """Check that a base model can be written with its memory as a gate.

    Raises:
        ModelError: it cannot, or not as a file of llama.cpp's.
    """
    require_stock(base, site)
    if gguf:
        require_gguf(base)


def write_gated(
    output: Path,
    base: Path,
    checkpoint: Checkpoint,
    manifest: Manifest,
    packing: Packing,
    *,
    load: LoadOptions,
    quantize: Quantization | None,
    on_progress: ProgressCallback,
) -> Gated:
    """Write a memory as blocks of a stock architecture into an empty directory.

    Args:
        quantize: how the weights of one file of llama.cpp's are stored; ``None`` writes a checkpoint of transformers'.
    """
    loaded = load_model(base, load)
    gate = gate_of(loaded, checkpoint, manifest, on_progress)
    stock = output if quantize is None else output / "stock"
    stock.mkdir(exist_ok=True)
    on_progress(Event("writing"))
    write_stock(stock, base, checkpoint, manifest.site, gate, packing)
    blocks = block_count(len(gate.values), base)
    found = _measured(loaded, stock, manifest, gate, blocks, load=load, on_progress=on_progress)
    if quantize is not None:
        own = range(manifest.site.layer + 1, manifest.site.layer + 1 + blocks)
        on_progress(Event("writing", note=GGUF_NAME))
        write_gguf(output / GGUF_NAME, stock, own, quantize)
        (output / MODELFILE_NAME).write_text(modelfile(stock, GGUF_NAME, date_of(loaded.tokenizer)), encoding="utf-8")
        for path in stock.iterdir():
            path.unlink()
        stock.rmdir()
    _write_manifest(output, manifest, found, "stock" if quantize is None else "gguf", date_of(loaded.tokenizer))
    return found


def gate_of(loaded: Loaded, checkpoint: Checkpoint, manifest: Manifest, on_progress: ProgressCallback) -> Gate:
    """Return a memory's gate, fitted to what the base model makes of its edits and of unrelated text."""
    identity = sha256_json([manifest.fingerprint.as_dict(), checkpoint.sample])
    quiet = background_states(
        loaded, manifest.site, identity, share=_share(manifest), batch_size=_BATCH, on_progress=on_progress
    )
    own = edit_states(loaded, manifest, batch_size=_BATCH, on_progress=on_progress)
    on_progress(Event("fitting", note=f"{len(own.values)} keys"))
    return fit_gate(own, quiet)


def _share(manifest: Manifest) -> float:
    """Return how much of the packaged text the memory's shards were made with: with few edits, less is read."""
    counts = [origin.settings.get("unrelated_texts") for origin in manifest.origins]
    return min([1.0, *(count / _TEXTS for count in counts if isinstance(count, int))])


def _write_manifest(output: Path, manifest: Manifest, found: Gated, form: str, day: str) -> None:
    """What the checkpoint is, for whoever has nothing else; ``day`` is what its fit was told that it is."""
    content = {
        "format": form,
        "versions": versions(),
        "chat_date": day,
        "base": {"model": manifest.model, "revision": manifest.revision, **manifest.fingerprint.as_dict()},
        "site": manifest.site.as_dict(),
        "gate": found.as_dict(),
        "edits": [edit.as_dict() for edit in manifest.edits],
    }
    write_json(output / MERGED, content)


def _measured(
    loaded: Loaded,
    stock: Path,
    manifest: Manifest,
    gate: Gate,
    blocks: int,
    *,
    load: LoadOptions,
    on_progress: ProgressCallback,
) -> Gated:
    """Ask the base model, then with the routed memory, then the checkpoint that was written."""
    edits = manifest.edits[:: -(-len(manifest.edits) // _ASKED)]
    rows = _unrelated_rows(loaded, edits)
    before = _next_tokens(loaded, rows, on_progress)
    routed = manifest.site.install(loaded.model, manifest.memory)
    routed.to(loaded.device)
    beside = _answers(loaded, edits, rows, before, on_progress)
    found = _answers(load_model(stock, load), edits, rows, before, on_progress)
    return Gated(len(gate.values), blocks, found, beside, len(edits), len(before))


def _unrelated_rows(loaded: Loaded, edits: Sequence[Edit]) -> list[Row]:
    """Unrelated texts that no gate was fitted to, and the edits' own prompts that are to stay as they are."""
    rows = [Row(tuple(loaded.tokenizer(text)["input_ids"]), ()) for text in texts_beside_gates()]
    probes = [(probe.prompt, probe.answer) for edit in edits for probe in edit.locality]
    pairs = [encode(loaded.tokenizer, *pair) for pair in probes]
    return [*rows, *(Row((*pair.prompt, *pair.target), ()) for pair in pairs)]


@torch.no_grad()
def _next_tokens(loaded: Loaded, rows: Sequence[Row], on_progress: ProgressCallback) -> Tensor:
    """Return the arg-max (n,) after every token of some rows."""
    found: dict[int, Tensor] = {}
    for indices in in_batches(rows, _BATCH):
        batch = collate([rows[index] for index in indices]).to(loaded.device)
        logits = loaded.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits
        best = logits.argmax(-1)
        found |= {index: best[place][batch.mask[place].bool()].cpu() for place, index in enumerate(indices)}
        on_progress(Event("unrelated text", len(found), len(rows)))
    return torch.cat([found[index] for index in range(len(rows))])


def _answers(
    loaded: Loaded, edits: Sequence[Edit], rows: Sequence[Row], before: Tensor, on_progress: ProgressCallback
) -> Answers:
    """Return what a model answers, all generated greedily, and where it goes on as ``before`` (n,)."""
    asked = [(edit.prompt, edit) for edit in edits]
    reworded = [(edit.rephrases[0], edit) for edit in edits if edit.rephrases]
    length = max(len(encode(loaded.tokenizer, edit.prompt, edit.answer).target) for edit in edits) + _MARGIN
    prompts = [prompt for prompt, _ in (*asked, *reworded)]
    on_progress(Event("edits", 0, len(prompts)))
    tokens = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=length, batch_size=_BATCH)
    texts = [text.strip() for text in loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    right = [_right(edit, text) for text, (_, edit) in zip(texts, (*asked, *reworded), strict=True)]
    same = (_next_tokens(loaded, rows, on_progress) == before).float().mean()
    return Answers(_mean(right[: len(asked)]), float(same), _mean(right[len(asked) :]) if reworded else None)


def _right(edit: Edit, text: str) -> bool:
    if edit.erased:
        return edit.answer.strip().casefold() not in text.casefold()
    return text == edit.answer.strip()


def _mean(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def gate_note(found: Gated) -> str:
    """Return what a gate answers beside the routed form, as a paragraph of a model card."""
    return f"\n{'; '.join(gate_lines(found.as_dict()))}.\n"


def gate_lines(gate: Mapping[str, Any]) -> list[str]:
    """Return the same as phrases, from what the manifest keeps."""
    blocks = f"{gate['keys']} keys in {gate['blocks']} decoder block{'s' * (gate['blocks'] > 1)} more"
    lines = [blocks]
    for name, what in (("as_taught", "as taught"), ("rephrased", "rephrased"), ("unrelated", "unrelated next tokens")):
        stock, routed = gate["stock"][name], gate["routed"][name]
        if stock is not None:
            lines.append(f"{what}: {stock:.1%} (routed {routed:.1%})")
    return lines
