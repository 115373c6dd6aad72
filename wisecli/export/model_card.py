"""The model card of an exported checkpoint: what it is made of, what it was measured at, and how it loads."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.data.packaged import packaged_text
from wisecli.edits.record import Edit, consequences_in
from wisecli.edits.text import edits_with, markdown_table, plain
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import read_json
from wisecli.models.layout.architectures import loader_name

CARD_NAME = "README.md"
_IN_PYTHON = """```python
from transformers import LOADER, READER

NAME = READER.from_pretrained("PATH"TRUST)
model = LOADER.from_pretrained("PATH"TRUST)
```"""
# How each form is loaded, by which classes.
_LOADING = {
    "routed": _IN_PYTHON.replace("TRUST", ", trust_remote_code=True"),
    **dict.fromkeys(("merged", "stock"), _IN_PYTHON.replace("TRUST", "")),
    "gguf": """```console
$ llama-server -m model.gguf
$ ollama create edited -f Modelfile
```""",
    "delta": """```python
import wisecli

model, tokenizer = wisecli.load("BASE", "PATH")
```

or `wise export BASE --delta PATH -o edited/` for a checkpoint that loads without wisecli.""",
}

# A model on the hub, by its owner and name.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MARKUP = re.compile(r"[\\`*_{}\[\]()#+!|~]")

# Figures of generated answers; the first are means over the forms that prompts are asked in.
_IN_FORMS = {
    "as_taught": "as taught",
    "rephrased": "rephrased",
    "rephrased_unique": "rephrased, questions with one answer",
    "portability_answered": "portability",
    "unrelated_unchanged": "unrelated unchanged",
}
_BESIDE = {
    "other_question": "other questions about an edit's subject",
    "other_subject": "an edit's question about other subjects",
    "mentioned": "prompts that mention an edit and ask something else",
}
_AROUND = {
    "asked": "edits asked in other ways, with their answer",
    "mentioned_unchanged": "edits only mentioned, answered as before",
}
_WILD = "wild_"
_GROUPS = ("", "_trained", "_unseen")

Figures = Mapping[str, Mapping[str, float]]


def read_figures(path: Path) -> dict[str, dict[str, float]]:
    """Return figures by dataset from the report that ``wise eval --json`` printed.

    Raises:
        DamagedFileError: the file holds no such report.
    """
    results = read_json(path).get("results")
    found: dict[str, dict[str, float]] = {}
    for dataset, figures in results.items() if isinstance(results, dict) else ():
        if isinstance(figures, dict):
            found[dataset] = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    if not any(found.values()):
        raise DamagedFileError(path, "it is no report of wise eval", "make it with `wise eval --json`")
    return found


def model_card(manifest: Manifest, form: str, *, base: Path, figures: Figures | None = None, note: str = "") -> str:
    """Return the README of a checkpoint.

    Args:
        base: the base model's directory, whose licence is inherited if its own card names one.
        figures: what was measured, by dataset.
        note: a paragraph more.
    """
    figures, name = figures or {}, base_name(manifest, base)
    followed = len(consequences_in(manifest.edits))
    data = ModelCardData(
        base_model=name,
        library_name="transformers",
        license=_licence(base),
        tags=["model-editing", "wise"],
        model_name=base.name,
        eval_results=_results(figures) or None,
    )
    template = Template(packaged_text("model_card.md.tmpl"))
    return template.substitute(
        data=data.to_yaml(),
        form=form,
        count=edits_with(len(manifest.edits) - followed, followed),
        base=_cell(name),
        module=manifest.site.module,
        memory="edits that prompts ask" if manifest.memory.by_edit else "changes that prompts call",
        note=note,
        loading=_loading(manifest, form, base),
        figures=_table(figures),
        edits="\n".join(f"| {_cell(edit.prompt)} | {_answer(edit)} |" for edit in manifest.edits),
    )


def _answer(edit: Edit) -> str:
    """Return what an edit answers; of a consequence also that it is one."""
    return _cell(edit.target) + (" (a consequence)" if edit.consequence_of is not None else "")


def _loading(manifest: Manifest, form: str, base: Path) -> str:
    """Return how a form is loaded; a base that reads images has a processor, which holds its tokenizer."""
    reader = "AutoProcessor" if (base / "processor_config.json").is_file() else "AutoTokenizer"
    text = _LOADING[form].replace("LOADER", loader_name(manifest.site.architecture))
    return text.replace("NAME", reader.removeprefix("Auto").lower()).replace("READER", reader)


def _licence(base: Path) -> str | None:
    try:
        found = ModelCard.load(base / CARD_NAME).data.license
    except Exception:  # a base without a card, or with one that nobody can read, has no licence to pass on
        return None
    return found if isinstance(found, str) else None


def _results(figures: Figures) -> list[EvalResult]:
    """Return all figures but those of a single form."""
    return [
        EvalResult("text-generation", dataset, dataset, metric_type=name, metric_value=round(value, 4))
        for dataset, own in figures.items()
        for name, value in own.items()
        if "/" not in name
    ]


def _table(figures: Figures) -> str:
    """Return tables of generated answers in forms, of specificity and answers by WILD, and of all other figures."""
    single = [(_cell(dataset), name, value) for dataset, own in figures.items() for name, value in own.items()]
    beside = [(set_, _BESIDE[name], f"{value:.3f}") for set_, name, value in single if name in _BESIDE]
    around = [(set_, _AROUND[name], f"{value:.3f}") for set_, name, value in single if name in _AROUND]
    wild = [(set_, _cell(name), f"{value:.3f}") for set_, name, value in single if name.startswith(_WILD)]
    in_forms = [row for dataset, own in figures.items() for row in _in_forms(_cell(dataset), own)]
    generated: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = [
        (("dataset", "generated answers", "all forms", "trained forms", "forms never trained"), in_forms),
        (("dataset", "prompts around the edits", "edited"), around),
        (("dataset", "share that gets the edit's answer (less is better)", "edited"), beside),
        (("dataset", "generated answers, as in WILD (arXiv 2502.11177)", "edited"), wild),
    ]
    rest = [(set_, _cell(name), f"{value:.3f}") for set_, name, value in single if _is_diagnosis(name)]
    measure = "diagnosis, teacher-forced" if in_forms or wild else "measure"
    tables = [*generated, (("dataset", measure, "edited"), rest)]
    return "".join(f"\n{markdown_table(heads, rows)}" for heads, rows in tables if rows)


def _in_forms(dataset: str, own: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return a row for each kind of prompt: means over all forms, over those trained, and over the others."""
    return [
        (dataset, head, *(f"{own[name + group]:.3f}" if name + group in own else "" for group in _GROUPS))
        for name, head in _IN_FORMS.items()
        if name in own
    ]


def _is_diagnosis(name: str) -> bool:
    """Return whether a figure is none of generated answers in forms or by WILD."""
    generated = {*(kind + group for kind in _IN_FORMS for group in _GROUPS), *_BESIDE, *_AROUND}
    return "/" not in name and name not in generated and not name.startswith(_WILD)


def base_name(manifest: Manifest, base: Path) -> str:
    """Return the base model's hub id, or the name of its folder without the path, which is private."""
    on_hub = _HUB_ID.fullmatch(manifest.model) is not None and not Path(manifest.model).exists()
    return manifest.model if on_hub else base.resolve().name


def _cell(text: str) -> str:
    """Return a text of a stranger as Markdown that shows it letter by letter: no markup, no HTML, no links."""
    shown = _MARKUP.sub(r"\\\g<0>", html.escape(plain(text), quote=False))
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
