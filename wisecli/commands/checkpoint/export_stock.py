"""The part of ``wise export`` that fits a router, writes it as a stock checkpoint, and measures what it does."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wisecli.artifacts.file_names import MERGED
from wisecli.artifacts.memory_manifest import Manifest
from wisecli.commands.checkpoint.export_source import ExportSource
from wisecli.environment import versions
from wisecli.export.gguf.gguf_file import GGUF_NAME, write_gguf
from wisecli.export.gguf.modelfile import MODELFILE_NAME, modelfile
from wisecli.export.stock.base_answers import base_answers
from wisecli.export.stock.router.router_blocks import Channels, router_blocks
from wisecli.export.stock.router.router_fitting import fitted_router
from wisecli.export.stock.stock_answers import Verified, evenly_spaced, verified
from wisecli.export.stock.stock_checkpoint import base_settings, write_stock
from wisecli.io.checkpoint import write_json
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.architectures import layer_count
from wisecli.models.layout.site import Site, fingerprint
from wisecli.models.loading import Loaded, load_model
from wisecli.models.prompts.chat_template import date_of, turn_marks
from wisecli.progress import Event, ProgressCallback

# Unrelated texts that shards are made with, unless less is asked for.
_TEXTS = 600
# A router stands at this share of the depth: deep enough to know what is asked.
_READS = 0.4


def write_as_blocks(output: Path, given: ExportSource, on_progress: ProgressCallback) -> dict[str, Any]:
    """Write a memory as blocks of a stock architecture into an empty directory, of transformers' or of llama.cpp's.

    Returns:
        What the manifest says of it: how many ``keys`` and ``blocks``, of which so many are behind the ``last`` layer,
        and what it answers, if that is verified.
    """
    checkpoint, manifest, quantize = given.checkpoint, _at_router(given), given.quantize
    loaded = load_model(given.base, given.load)
    identity = BaseIdentity.of(checkpoint, manifest.fingerprint.config, loaded.tokenizer)
    router = fitted_router(loaded, manifest, identity, _share(manifest), on_progress)
    extra = Channels.of(router).count
    stock = output if quantize is None else output / "stock"
    stock.mkdir(exist_ok=True)
    on_progress(Event("writing"))
    blocks = router_blocks(router, base_settings(given.base))
    own = write_stock(stock, given.base, checkpoint, manifest.site, blocks, extra, given.packing)
    answered = _verified(loaded, stock, given, identity.exact, len(blocks.last), on_progress) if given.verify else None
    found = {"keys": len(router.places.edit), "blocks": len(own), "last": len(blocks.last)}
    found |= {} if answered is None else asdict(answered)
    if quantize is not None:
        on_progress(Event("writing", note=GGUF_NAME))
        write_gguf(output / GGUF_NAME, stock, own, quantize)
        (output / MODELFILE_NAME).write_text(modelfile(stock, GGUF_NAME, date_of(loaded.tokenizer)), encoding="utf-8")
        for path in stock.iterdir():
            path.unlink()
        stock.rmdir()
    _write_manifest(output, manifest, found, "stock" if quantize is None else "gguf", date_of(loaded.tokenizer))
    return found


def router_layer(base: Path, site: Site) -> Site:
    """Return the layer of a base model that a stock checkpoint's router reads, at most the edited one."""
    return site.below(min(site.layer, round(_READS * layer_count(base))))


def _at_router(given: ExportSource) -> Manifest:
    """Return the manifest with the layer that the router reads as its site, at most the edited one."""
    site = router_layer(given.base, given.manifest.site)
    return replace(given.manifest, site=site, fingerprint=fingerprint(given.base, given.checkpoint, site))


def _share(manifest: Manifest) -> float:
    """Return how much of the packaged text the memory's shards were made with: with few edits, less is read."""
    counts = [origin.settings.get("unrelated_texts") for origin in manifest.origins]
    return min([1.0, *(count / _TEXTS for count in counts if isinstance(count, int))])


def _write_manifest(output: Path, manifest: Manifest, found: dict[str, Any], form: str, day: str) -> None:
    """Write the manifest of a checkpoint; ``day`` is the date in the chat template that it was fitted with."""
    content = {
        "format": form,
        "versions": versions(),
        "chat_date": day,
        "base": {"model": manifest.model, "revision": manifest.revision, **manifest.fingerprint.as_dict()},
        "site": manifest.site.as_dict(),
        "gate": found,
        "edits": [edit.as_dict() for edit in manifest.edits],
    }
    write_json(output / MERGED, content)


def _verified(
    loaded: Loaded, stock: Path, given: ExportSource, identity: str, last: int, on_progress: ProgressCallback
) -> Verified:
    """Ask the base model, then with the routed memory, then the checkpoint that was written."""
    manifest = given.manifest
    before = base_answers(loaded, identity, evenly_spaced(manifest.edits), on_progress)
    routed = manifest.site.install(loaded.model, manifest.memory, turn_marks(loaded.tokenizer))
    routed.to(loaded.device)
    return verified(before, loaded, load_model(stock, given.load), manifest, last, on_progress)
