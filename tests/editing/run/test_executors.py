import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.helpers import contents, save_tiny
from support.loading import CPU

from wisecli.commands.edit.edit import edit as run_edit
from wisecli.commands.edit.run_options import RunOptions
from wisecli.config import EditSettings
from wisecli.errors import ModelError, SettingsError
from wisecli.progress import Event

SYLLABLES = [consonant + vowel for consonant in "bdfgklm" for vowel in "aeiou"]
EDITS = [{"prompt": f"{SYLLABLES[n]} {SYLLABLES[n + 7]}", "target": SYLLABLES[n + 5]} for n in range(8)]
SETTINGS = EditSettings(shards=8, unrelated_texts=16, layer="2", residual_stop=0.2)

pytestmark = pytest.mark.filterwarnings(
    "default::ResourceWarning", "default::DeprecationWarning", "default::FutureWarning"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, edits, and the shards of a run in this process."""
    root = tmp_path_factory.mktemp("executors")
    save_tiny(root / "model")
    (root / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    run_edit(str(root / "model"), root / "edits.jsonl", root / "whole", SETTINGS, load=CPU)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes that run one task each; the head runs none."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    cluster.workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster
    del os.environ["RAY_ADDRESS"]
    cluster.shutdown()


@pytest.mark.thorough
def test_an_error_in_a_task_is_the_same_sentence_with_the_same_exit_code(
    place: Path, tmp_path: Path, cluster: Any
) -> None:
    (tmp_path / "edits.jsonl").write_text('{"id": "hush", "prompt": "ka", "target": "?!"}\n')
    with pytest.raises(Exception, match="edit 'hush' cannot be used") as raised:
        run_edit(
            str(place / "model"),
            tmp_path / "edits.jsonl",
            tmp_path / "shards",
            EditSettings(unrelated_texts=16, layer="2", residual_stop=0.2),
            load=CPU,
            options=RunOptions(executor="ray"),
        )
    assert raised.value.exit_code == ModelError.exit_code  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == [tmp_path / "edits.jsonl"]


@pytest.mark.thorough
def test_a_cluster_that_loses_a_node_writes_the_same_bytes_as_one_process(
    place: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    lost = []

    def watch(event: Event) -> None:
        if event.stage == "shards" and event.done == 3 and not lost:
            lost.append(event.done)
            cluster.remove_node(cluster.workers[0], allow_graceful=False)

    report = run_edit(
        "model",
        Path("edits.jsonl"),
        tmp_path / "shards",
        SETTINGS,
        load=CPU,
        options=RunOptions(executor="ray"),
        on_progress=watch,
    )
    assert lost == [3]
    assert (report.shards, report.missing) == (8, 0)
    assert contents(tmp_path / "shards") == contents(place / "whole")


@pytest.mark.parametrize(
    ("executor", "says"),
    [
        ("slurm", r"executor must be local, ray or ray://HOST:PORT, not 'slurm'"),
        ("ray://nowhere.invalid:1", "no Ray answers there"),
        ("ray://localhost:1", "no Ray answers there .*refused"),
        ("ray://localhost:many", "no Ray answers there"),
    ],
)
def test_an_executor_that_is_not_there_is_refused(place: Path, tmp_path: Path, executor: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        run_edit(
            str(place / "model"),
            place / "edits.jsonl",
            tmp_path / "shards",
            SETTINGS,
            load=CPU,
            options=RunOptions(executor=executor),
        )
    assert list(tmp_path.iterdir()) == []
