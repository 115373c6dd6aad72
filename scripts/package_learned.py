"""Write what is learned of a base model into the package; what the cache has is not learned again.

python scripts/package_learned.py model smollm2-135m-instruct
"""

import sys
from pathlib import Path

from wisecli.commands.checkpoint.export_stock import router_layer
from wisecli.config import EditSettings, LoadOptions
from wisecli.editing.background.background_cache import BackgroundReader
from wisecli.editing.router_training.router_heads import package_heads
from wisecli.editing.router_training.token_states import read_sites
from wisecli.export.stock.router.reader_training import ReaderSettings, reader_key, relation_reader
from wisecli.export.stock.text_states import StateCapture
from wisecli.io.checkpoint import Checkpoint
from wisecli.io.packaged_weights import PACKAGED, save_packaged
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.layout.site import find_site, fingerprint
from wisecli.models.loading import load_model
from wisecli.progress import ignore_progress


def package(model: Path, name: str) -> None:
    """Write the router heads of the layers that are read by default, and a stock checkpoint's relation reader."""
    heads, reader = (PACKAGED / f"{name}-{part}.safetensors" for part in ("heads", "reader"))
    for path in (heads, reader):
        path.unlink(missing_ok=True)
    checkpoint, loaded = Checkpoint(model), load_model(model, load=LoadOptions(device="cpu"))
    site = find_site(model, checkpoint, layout=find_layout(model, checkpoint, lookup=True))
    base, sites = fingerprint(model, checkpoint, site), read_sites(loaded, site)
    known = BackgroundReader(loaded, checkpoint, base, EditSettings(), ignore_progress)
    package_heads(heads, known.heads(site), known.identity, sites)
    site = router_layer(model, site)
    learned = relation_reader(StateCapture(loaded, site, ignore_progress), known.identity, share=1.0)
    save_packaged(reader, learned.state_dict(), reader_key(known.identity, site, ReaderSettings().of_share(1.0)))


if __name__ == "__main__":
    package(Path(sys.argv[1]), sys.argv[2])
