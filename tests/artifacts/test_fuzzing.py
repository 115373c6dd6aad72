"""Whatever is wrong in edits, settings, policies and manifests, it is read or refused in one sentence, and quickly."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fuzzing import wrong
from support.places import EDITS, make_places

from wisecli.artifacts.checksums import read_checksums
from wisecli.artifacts.memory_manifest import read_manifest
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.cli.unknown_settings import unknown_names
from wisecli.config import BenchSettings, EditSettings, EvalSettings, MergeSettings, resolve
from wisecli.edits.checks.admission import DEFAULT_ADMISSION
from wisecli.edits.checks.policy import read_policy
from wisecli.edits.text import plain
from wisecli.errors import DamagedFileError, EditFileError, SettingsError, WiseError
from wisecli.memory.history.release_log import HISTORY, LOG, read_history

Sweep = Callable[[int, int], int]
SMALL, FULL = 300, 10_000
# No refusal takes longer, so that nothing grows without bounds.
SLOWEST = 5.0
LONGEST = 2500

LINES = [
    *EDITS,
    {"id": 7, "op": "modify", "prompt": "ba", "target": "do", "who": "me", "when": "2026-11-01", "source": "s"},
    {
        "op": "erase",
        "prompt": "ba",
        "target": "do",
        "replacement": "du",
        "portability": [{"prompt": "a", "answer": "b"}],
    },
    {"subject": "Bebi", "src": "ba be", "alt": "do", "rephrase": "be", "loc": "nq question: ma", "loc_ans": "mu"},
    {
        "case_id": 3,
        "requested_rewrite": {
            "prompt": "{} is",
            "subject": "Ba",
            "target_new": {"str": "do"},
            "target_true": {"str": "da"},
        },
        "paraphrase_prompts": ["ba ba"],
        "neighborhood_prompts": ["ka ka"],
    },
]
TOML = b"""
[edit]
preset = "paper"
layer = "auto"
mask-ratio = 0.25
passes = 3
router = "meaning"
chat = true

[merge]
method = "ties"
weights = [1.0, 0.5]
false_alarm = 1e-3

[eval]
dataset = "zsre"
edits = 10

[bench]
methods = "wise,rome"
"""
POLICY = b"""
forbidden_subjects = ["Ada Lovelace", "Z\xc3\xbcrich"]
forbidden_patterns = ["pass(word|phrase)s?", "\\\\d{4,}"]
maximum_edits = 50
require = ["who", "source"]
allowed_operations = ["insert", "modify"]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_places(tmp_path_factory.mktemp("fuzzing"))


def hold(contents: list[bytes], count: int, read: Callable[[bytes], object], refusal: type[WiseError]) -> None:
    """Each content is read, or refused by such an error, whose sentence can be printed; neither is rare."""
    outcomes = {"read": 0, "refused": 0}
    for content in wrong(contents, count):
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as the command line has it
                read(content)
            outcomes["read"] += 1
        except refusal as error:
            assert "\n" not in plain(str(error)), content
            assert len(str(error)) < LONGEST, content
            outcomes["refused"] += 1
        assert time.perf_counter() - begun < SLOWEST, content
    assert min(outcomes.values()) > count / 100, outcomes


def test_edits(sweep: Sweep) -> None:
    rows = [json.dumps(line, ensure_ascii=False).encode() for line in LINES]
    sources = [b"\n".join(rows), b"[" + b",".join(rows) + b"]", *rows]
    hold(
        sources,
        sweep(SMALL, FULL),
        lambda content: DEFAULT_ADMISSION.parse(Path("edits.jsonl"), content),
        EditFileError,
    )


@pytest.mark.parametrize(
    ("kind", "section"),
    [(EditSettings, "edit"), (MergeSettings, "merge"), (EvalSettings, "eval"), (BenchSettings, "bench")],
    ids=["edit", "merge", "eval", "bench"],
)
def test_settings(sweep: Sweep, tmp_path: Path, kind: type[EditSettings], section: str) -> None:
    file = tmp_path / "wise.toml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        resolve(kind, {}, section=section, file=file)
        unknown_names(file)

    hold([TOML], sweep(SMALL, FULL // 4), read, SettingsError)


def test_policies(sweep: Sweep, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_policy(file)

    hold([POLICY], sweep(SMALL, FULL), read, SettingsError)


@pytest.mark.parametrize(
    ("place", "name", "read"),
    [
        ("shards", "shards.json", read_shard_directory),
        ("memory", "router.json", read_manifest),
        ("retrieve", "router.json", read_manifest),
        ("edited", "router.json", read_manifest),
        ("memory", f"{HISTORY}/{LOG}", read_history),
        ("edited", "SHA256SUMS", read_checksums),
    ],
)
def test_manifests(
    sweep: Sweep, places: Path, place: str, name: str, read: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    path = places / place / name
    whole = path.read_bytes()
    request.addfinalizer(lambda: path.write_bytes(whole))

    def read_again(content: bytes) -> None:
        path.unlink()  # it may be one file with another
        path.write_bytes(content)
        read(places / place)

    hold([whole], sweep(SMALL, FULL // 4), read_again, DamagedFileError)
