"""Checks of the code that a routed checkpoint carries."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wisecli.artifacts.integrity import Check
from wisecli.errors import ModelError, WiseError
from wisecli.io.checkpoint import EXPORTED_KEY
from wisecli.io.digest import sha256_file, sha256_text
from wisecli.io.json_schema import shown
from wisecli.io.safe_paths import inside

_CONFIG = "config.json"


def check_code(path: Path, config: dict[str, Any]) -> Iterator[Check]:
    """Check the code that runs with ``trust_remote_code`` against what this version writes, or 0.1 wrote."""
    from wisecli.export.routed.custom_code import (
        CODE_NAME,
        auto_map,
        code_files,
        former_auto_map,
        former_code,
        own_classes,
    )

    described = config.get(EXPORTED_KEY)
    described = described if isinstance(described, dict) else {}
    model_type = described.get("model_type")
    try:
        own = own_classes(str(model_type), described.get("code"))
        files = code_files(str(model_type), own)
        former = {} if own else former_code(str(model_type))
    except (ValueError, KeyError, ModelError):
        yield Check("custom code", CODE_NAME, "differs", expected="a known model type", found=shown(model_type))
        return
    expected_code = {file: sha256_text(text) for file, text in files.items()}
    classes = auto_map
    if former and former.keys() <= {entry.name for entry in path.iterdir()}:
        expected_code, classes = former, former_auto_map
    for file, digest in expected_code.items():
        try:
            same = sha256_file(inside(path, file)) == digest
        except (WiseError, OSError, ValueError):
            same = False
        sides = ("what this version writes", "other code, or none")
        yield Check("custom code", file) if same else Check("custom code", file, "differs", None, *sides)
    expected, found = classes(str(model_type)), config.get("auto_map")
    found = found if isinstance(found, dict) else {}
    for auto in sorted(expected.keys() | found.keys(), key=str):
        if found.get(auto) != expected.get(auto):
            sides = (expected.get(auto, "nothing"), shown(found.get(auto)))
            yield Check(f"auto_map.{auto}", _CONFIG, "differs", None, *sides)
