"""``wise draft``: a document → questions with answers, drawn by the model, for somebody to approve of."""

import time
from dataclasses import dataclass
from pathlib import Path

from wisecli.config import LoadOptions
from wisecli.drafting.chunking import Passage, passages
from wisecli.drafting.questions import Pair, draw_pairs
from wisecli.errors import EditFileError
from wisecli.models.loading import load_model
from wisecli.models.model_files import find_model
from wisecli.progress import ProgressCallback, ignore_progress


@dataclass(frozen=True)
class DraftReport:
    """The pairs that a model drew from a document's passages."""

    page: Path
    passages: int
    pairs: tuple[Pair, ...]
    seconds: float


def draft(
    model: str,
    page: Path,
    *,
    each: int = 3,
    batch_size: int = 8,
    load: LoadOptions = LoadOptions(),
    on_progress: ProgressCallback = ignore_progress,
) -> DraftReport:
    """Let a model draw questions with answers from a document in Markdown or plain text. Nothing is written.

    Args:
        each: pairs of a passage at most.

    Raises:
        EditFileError: the document cannot be read, or has no passage in it.
        ModelError: the model cannot be used.
    """
    started = time.perf_counter()
    found = _read(page)
    loaded = load_model(find_model(model, on_progress=on_progress), load)
    pairs = draw_pairs(loaded, found, each=each, batch_size=batch_size, on_progress=on_progress)
    return DraftReport(page, len(found), tuple(pairs), time.perf_counter() - started)


def _read(page: Path) -> list[Passage]:
    """Return the passages of a document."""
    try:
        text = page.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise EditFileError(page, "no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EditFileError(page, f"not readable as UTF-8 text ({error}); save it as UTF-8") from None
    found = passages(text)
    if not found:
        raise EditFileError(page, "there is no paragraph in it to ask about")
    return found
