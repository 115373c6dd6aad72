"""``wise.json`` of a checkpoint in which the memory is decoder blocks, and checks of those and of what is around."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wisecli.artifacts.file_names import MERGED
from wisecli.artifacts.integrity import Check, damaged
from wisecli.artifacts.memory_manifest import Base
from wisecli.edits.record import Edit
from wisecli.errors import DamagedFileError, ModelError, WiseError
from wisecli.export.stock.checkpoint.decoder_block import LayerSizes
from wisecli.export.stock.checkpoint.widening import Widening
from wisecli.io.checkpoint import Checkpoint, all_finite, read_json
from wisecli.io.json_schema import OPEN, decode
from wisecli.io.safetensors_header import TensorLayout
from wisecli.models.layout.architectures import stored_weight
from wisecli.models.layout.site import Site, StoredSite, check_site

# The last matrix of a feed-forward in Llama's layers.
VALUE_MATRIX = "mlp.down_proj"


@dataclass(frozen=True)
class BlocksEntry:
    """How large a memory is as decoder blocks, of which so many are behind the ``last`` layer; what was measured of it
    stands beside that.
    """

    __pydantic_config__ = OPEN

    keys: int
    blocks: int
    last: int = 0


@dataclass(frozen=True)
class StockManifest:
    """What a ``stock`` or ``gguf`` export says of itself, every field checked."""

    __pydantic_config__ = OPEN

    format: Literal["stock", "gguf"]
    base: Base
    site: StoredSite
    gate: BlocksEntry
    edits: tuple[Edit, ...]
    versions: dict[str, str]

    def blocks(self, layers: int) -> list[int]:
        """Return which of a checkpoint's ``layers`` are the memory, by number."""
        return memory_blocks(self.site.layer, layers, self.gate.blocks, self.gate.last)


def memory_blocks(layer: int, layers: int, blocks: int, last: int) -> list[int]:
    """Return which of ``layers`` are a memory's ``blocks``: those behind the router's ``layer``, and the ``last``."""
    return [*range(layer + 1, layer + 1 + blocks - last), *range(layers - last, layers)]


def read_stock(directory: Path) -> StockManifest:
    """Read and check ``wise.json`` of a stock checkpoint.

    Raises:
        DamagedFileError: it is missing, or not what ``wise export`` writes.
    """
    path = directory / MERGED
    try:
        manifest = decode(StockManifest, read_json(path))
        check_site(manifest.site)
    except ValueError as error:
        raise DamagedFileError(path, f"an entry is missing or wrong ({error})", "export anew") from None
    return manifest


def figures_of(directory: Path) -> dict[str, Any]:
    """Return what the manifest says was measured of it."""
    found = read_json(directory / MERGED).get("gate")
    return found if isinstance(found, dict) else {}


def has_router_blocks(directory: Path) -> bool:
    """Return whether a directory is a stock checkpoint, as transformers loads it."""
    return (directory / MERGED).is_file() and read_json(directory / MERGED).get("format") == "stock"


def is_wider(directory: Path, manifest: StockManifest) -> bool:
    """Return whether a checkpoint's stream has more channels than the base model's."""
    try:
        return _widening(directory, manifest).changes
    except DamagedFileError:
        return False


def _widening(directory: Path, manifest: StockManifest) -> Widening:
    """Return from how many channels to how many the written config says that the stream was widened."""
    hidden, width = manifest.site.d, read_json(directory / "config.json").get("hidden_size")
    return Widening(hidden, width if type(width) is int and width > hidden else hidden)


def check_blocks(directory: Path, manifest: StockManifest) -> Iterator[Check]:
    """Yield whether every tensor of the memory's blocks is there, of the config's sizes and finite."""
    try:
        checkpoint = Checkpoint(directory)
        layers = layers_path(checkpoint, manifest.site)
        yield from _whole_blocks(checkpoint, layers, manifest)
    except (WiseError, KeyError, ValueError, TypeError) as error:
        yield damaged(
            MERGED, DamagedFileError(directory, f"the memory's blocks cannot be read ({error})", "export anew")
        )


def _whole_blocks(checkpoint: Checkpoint, layers: str, manifest: StockManifest) -> Iterator[Check]:
    """Yield a check for each tensor of the inserted blocks that has another shape or numbers that are not finite."""
    config, wrong = read_json(checkpoint.directory / "config.json"), 0
    shapes, numbers = LayerSizes.of(config).shapes, manifest.blocks(int(config["num_hidden_layers"]))
    for name, shape in ((f"{layers}.{n}.{name}", shape) for n in numbers for name, shape in shapes.items()):
        wanted, found = "×".join(map(str, shape)), "nothing"
        if name in checkpoint:
            found = "×".join(map(str, checkpoint.shape(name)))
        if found == wanted:
            if all_finite(checkpoint.load(name)):
                continue
            wanted, found = "finite numbers", "others"
        wrong += 1
        yield Check("memory's blocks", MERGED, "differs", name, wanted, found)
    if not wrong:
        yield Check(f"all tensors of {manifest.gate.blocks} blocks", MERGED)


def check_around(directory: Path, base: Path, manifest: StockManifest) -> Iterator[Check]:
    """Yield a check of each tensor of the base model against the one that the checkpoint has in its place."""
    try:
        written, stored, widening = Checkpoint(directory), Checkpoint(base), _widening(directory, manifest)
        layers = layers_path(stored, manifest.site)
        wrong = 0
        for name in stored:
            new_name = moved(name, layers, after=manifest.site.layer, by=manifest.gate.blocks - manifest.gate.last)
            if new_name not in written:
                wrong += 1
                yield Check("tensors of the base model", MERGED, "differs", new_name, "in a file", "nothing")
            elif not _same(written, new_name, stored, name, widening):
                wrong += 1
                yield Check("tensors of the base model", MERGED, "differs", new_name, f"as in {base}", "other numbers")
    except WiseError as error:
        yield damaged(str(base), error)
        return
    if not wrong:
        yield Check("all tensors of the base model", str(base))


def _same(written: Checkpoint, new_name: str, stored: Checkpoint, name: str, widening: Widening) -> bool:
    """Return whether a written tensor is a stored one, widened."""
    layout = TensorLayout(str(stored.dtype(name)).removeprefix("torch."), stored.shape(name))
    # Before anything is made as wide as the config says.
    if widening.layout(name, layout).shape != written.shape(new_name):
        return False
    return torch.equal(written.load(new_name), widening.tensor(name, stored.load(name)).to(written.dtype(new_name)))


def moved(name: str, layers: str, *, after: int, by: int) -> str:
    """Return the name of a base model's tensor where ``by`` blocks were put in after a layer."""
    number, dot, rest = name.removeprefix(f"{layers}.").partition(".")
    if not name.startswith(f"{layers}.") or not dot or not number.isdecimal() or int(number) <= after:
        return name
    return f"{layers}.{int(number) + by}.{rest}"


def layers_path(checkpoint: Checkpoint, site: Site) -> str:
    """Return where a checkpoint keeps its layers.

    Raises:
        ModelError: it keeps the router's layer under another name than stock architectures do.
    """
    module = value_matrix(site)
    stored, end = stored_weight(checkpoint, module), f".{site.layer}.{VALUE_MATRIX}.weight"
    if stored is None or not stored.endswith(end):
        raise ModelError(f"{checkpoint.directory} keeps {module}.weight under another name; use --format routed")
    return stored.removesuffix(end)


def value_matrix(site: Site) -> str:
    """Return the path of the value matrix in a site's layer of Llama."""
    return f"{site.layer_module}.{VALUE_MATRIX}"
