import json
import shutil
from pathlib import Path

import pytest
from support.helpers import rewrite
from support.ready import Ready, here, manifest, require_refusal, write_edits
from support.tiny_models import Wise

FURTHER = [{"id": "five", "prompt": "na ne", "target": "ni"}]


def module_of(place: str) -> str:
    return str(manifest(Path(place))["site"].get("module", "behind"))


def test_a_lookup_lies_behind_a_layer_and_what_becomes_a_matrix_at_one(wise: Wise, ready: Ready) -> None:
    sites = {name: module_of(str(ready.root / name)) for name in ("shards", "shards-at-matrix", "gradient-shards")}
    matrix = "model.layers.3.mlp.down_proj"
    assert sites == {"shards": "behind", "shards-at-matrix": matrix, "gradient-shards": matrix}
    assert module_of(ready.matrix_shards) == matrix  # in_forms=false asks for one, too
    told = wise("edit", ready.model, ready.edits, "--dry-run", "--set", "in_forms=false", "--set", "site=layer")
    assert "model.layers.3.wise_memory" in told.out


@pytest.mark.parametrize(
    "line", ["--mode merge", "--mode retrieve", "--method ties --set density=.3", "--set refit=true"]
)
def test_shards_behind_a_layer_become_no_matrix(wise: Wise, ready: Ready, line: str) -> None:
    outcome = wise("merge", ready.shards, *line.split())
    require_refusal(outcome, "behind layer 3", "wise edit --set site=matrix", "--mode merge")
    assert here() == []


def test_what_asks_for_both_sites_is_refused(wise: Wise, ready: Ready) -> None:
    line = ("edit", ready.model, ready.edits, "--set", "site=layer")
    require_refusal(wise(*line, "--set", "writer=gradient"), "--set site=layer is for what the closed form writes")
    named = ("--set", "target_module=model.layers.{layer}", "--set", "site=matrix")
    require_refusal(wise("edit", ready.model, ready.edits, *named), "names layers, and a matrix is needed")


@pytest.mark.parametrize(("shards", "site"), [("shards", "layer"), ("shards-at-matrix", "matrix")])
def test_a_memory_goes_on_at_its_site(wise: Wise, ready: Ready, shards: str, site: str) -> None:
    # Shards of older versions do not say which kind of site was asked for.
    shutil.copytree(ready.root / shards, "older")
    settings = manifest(Path("older"))["settings"]
    rewrite(Path("older") / "shards.json", settings={name: one for name, one in settings.items() if name != "site"})
    assert wise("merge", "older").code == 0
    more = str(write_edits(Path("more"), FURTHER))
    other = {"layer": "matrix", "matrix": "layer"}[site]
    require_refusal(
        wise("edit", ready.model, more, "--into", "memory", "--set", f"site={other}"), f"its edits at a {site}"
    )
    outcome = wise("edit", ready.model, more, "--into", "memory", "--json")
    assert outcome.code == 0, outcome.err
    assert module_of("memory") == module_of(str(ready.root / shards))
    assert json.loads(wise("generate", "memory", "na ne", "--json").out)["results"][0]["answer"] == "ni"
