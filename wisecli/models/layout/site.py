"""Which site a model is edited at, and what identifies a model by it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from wisecli.errors import ModelError, SettingsError
from wisecli.io.checkpoint import Checkpoint, read_json
from wisecli.io.digest import sha256_json
from wisecli.io.json_schema import shown
from wisecli.models.layout.architectures import (
    LONGEST_SIDE,
    Layout,
    known_layout,
    layer_count,
    state_width,
    stored_weight,
)
from wisecli.models.layout.layer_site import LayerSite
from wisecli.models.layout.matrix_site import MatrixSite
from wisecli.models.layout.site_interface import Site

__all__ = [
    "AUTO_DEPTH",
    "Fingerprint",
    "LayerSite",
    "MatrixSite",
    "Site",
    "StoredSite",
    "check_site",
    "find_site",
    "fingerprint",
]

# The paper's best layers lie at about four fifths of the depth (section 3.3: layer 27 of 32), and so do ours.
AUTO_DEPTH = 0.8

# As manifests keep one.
StoredSite = LayerSite | MatrixSite


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a base model: its settings and what is edited of it."""

    matrix: str
    config: str

    def as_dict(self) -> dict[str, str]:
        """Return the JSON form, as the manifests keep it."""
        return asdict(self)


def find_site(directory: Path, checkpoint: Checkpoint, layer: str | int = "auto", layout: Layout | None = None) -> Site:
    """Return the site in one layer, from the model's ``config.json`` and the weight headers alone.

    Args:
        layer: a layer's index, or ``auto`` for the one at four fifths of the depth.
        layout: where the architecture keeps its layers and matrices, if not where the table says.

    Raises:
        UnknownArchitectureError: the architecture has no row in the table.
        SettingsError: the model has no such layer.
        ModelError: the checkpoint does not hold the matrix, or the model is too shallow.
    """
    layout = layout or known_layout(directory)
    index = _layer_index(directory, layer, layout.depth or layer_count(directory))
    layer_module = f"{layout.layers}.{index}"
    if layout.value is None:
        width = layout.width or state_width(directory)
        return LayerSite(layout.architecture, index, layer_module, width, layout.above, layout.decoder, layout.streams)
    module = f"{layer_module}.{layout.value}"
    weight = stored_weight(checkpoint, module)
    if weight is None:
        raise ModelError(f"{directory}: the checkpoint holds no tensor {module}.weight; is config.json this model's?")
    shape = checkpoint.shape(weight)
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{directory}: tensor {weight} is no matrix; is config.json this model's?")
    d_ff, d = shape if layout.transposed else shape[::-1]
    norm = f"{layer_module}.{layout.norm}" if layout.norm else None
    return MatrixSite(
        layout.architecture, index, layer_module, module, layout.transposed, d, d_ff, norm, layout.multiplier
    )


def _layer_index(directory: Path, layer: str | int, count: int) -> int:
    """Return the index of the layer that ``--layer`` names; ``auto`` is a fixed share of the depth."""
    if count < 2:
        raise ModelError(
            f"{directory}: config.json names fewer than two layers, and one must stay above the edit; edit another"
        )
    if layer == "auto":
        return max(0, min(round(AUTO_DEPTH * count), count - 2))
    try:
        index = int(layer)
    except ValueError:
        raise SettingsError(f"--layer must be `auto` or a number, not {layer!r}") from None
    if not 0 <= index < count - 1:
        raise SettingsError(f"--layer {index} is out of range: choose 0 to {count - 2}, or auto")
    return index


def fingerprint(directory: Path, checkpoint: Checkpoint, site: Site) -> Fingerprint:
    """Identify a base model by its settings and what is edited of it."""
    config = read_json(directory / "config.json")
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    return Fingerprint(site.digest(checkpoint), sha256_json(config))


def check_site(site: Site) -> None:
    """Check that a site which a manifest describes can be one.

    Raises:
        ValueError: saying what cannot be right.
    """
    if not (0 < site.d < LONGEST_SIDE and 0 < site.width < LONGEST_SIDE):
        raise ValueError(f"`site` has a matrix of {site.d}×{site.width}")
    nested = site.module.startswith(f"{site.layer_module}.") and site.layer_module.endswith(f".{site.layer}")
    if site.layer < 0 or not nested:
        raise ValueError(f"`site.module` {shown(site.module)} is not in layer {site.layer}")
