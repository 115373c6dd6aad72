"""A tiny model with records, and studies of them."""

import json
from pathlib import Path
from typing import Any

from support.helpers import save_tiny
from support.loading import CPU
from wisecli.bench.study import StudyReport, study
from wisecli.config import BenchSettings

ALL = "router,layers,shards,merge,scaling,latency"
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]


def record(number: int) -> dict[str, Any]:
    """A fact whose rephrase is nearly its prompt, so that the router finds some of them."""
    subject, other = _SYLLABLES[number], _SYLLABLES[number + 20]
    return {
        "id": str(number),
        "prompt": f"ka mo {other} {subject}",
        "target": f"{_SYLLABLES[number + 9]} {_SYLLABLES[number + 30]}",
        "subject": subject,
        "rephrases": [f"mo {other} {subject}"],
        "locality": [{"prompt": f"{other} mo {_SYLLABLES[number + 7]}", "answer": "be"}],
    }


def make_place(root: Path) -> Path:
    """A model and a file of records."""
    save_tiny(root / "model", loudness=1)
    (root / "data.jsonl").write_text("".join(json.dumps(record(number)) + "\n" for number in range(12)))
    return root


def studied(place: Path, output: Path, **settings: Any) -> StudyReport:
    """Some studies of it; small ones by default."""
    named = {name: settings.pop(name) for name in ("force", "on_progress") if name in settings}
    given = {"study": ALL, "counts": "6", "layers": 3, "mask_ratios": ".3,.6", "shard_counts": "1,2,8", **settings}
    data = [place / "data.jsonl"]
    return study(str(place / "model"), output, BenchSettings(**given), data=data, load=CPU, **named)
