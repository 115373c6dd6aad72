"""Benchmark layouts → the fields of one edit record. Layouts are tables; nothing here reads a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

# Our field ← the names it goes by elsewhere (zsRE/MEND, KnowEdit, SelfCheckGPT/temporal, CounterFact,
# WikiBigEdit).
ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "case_id"),
    "op": ("op",),
    "prompt": ("prompt", "src", "update"),
    "target": ("target", "alt", "target_new", "ans"),
    "subject": ("subject",),
    "replacement": ("replacement",),
    "rephrases": ("rephrases", "rephrase", "rephrase_prompt", "paraphrase_prompts"),
    "irrelevant": ("irrelevant",),
    "ood": ("ood", "ood_rephrase"),
    "who": ("who",),
    "when": ("when",),
    "source": ("source",),
    "translations": ("translations",),
    "also": ("also",),
    "consequence_of": ("consequence_of",),
    "derived": ("derived",),
}
_LISTS = ("rephrases", "irrelevant", "ood")


_EVALUATED = ("locality", "portability")
# Fields by which a record of a benchmark is known: such have many more that nobody asks for.
_BENCHMARK_FIELDS = ("src", "alt", "target_new", "ground_truth", "requested_rewrite", "update", "ans", "loc")
# Without these an edit is another than was meant; without the others less is measured or kept of it.
_DECISIVE = ("prompt", "target", "op", "replacement", "translations", "also")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark known by name: the hub dataset and file it can be fetched from, if any, and what is measured."""

    name: str
    repository: str | None = None
    file: str | None = None
    revision: str | None = None
    perplexity: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for row in (
        Benchmark("zsre", "zjunlp/KnowEdit", "benchmark/ZsRE/ZsRE-test-all.json"),
        # The form into which the hub turns every dataset.
        Benchmark("counterfact", "azhx/counterfact", "default/test/0000.parquet", "refs/convert/parquet"),
        # The first of its eight spans of time.
        Benchmark("wikibigedit", "lukasthede/WikiBigEdit", "wiki_big_edit_20240201_20240220.json"),
        # Published with the paper's code, on no hub.
        Benchmark("hallucination", perplexity=True),
        Benchmark("temporal"),
    )
}


def canonical(record: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a record's fields from any known layout to those of an edit record.

    Values are passed on as they are: checking them is the reader's work.
    """
    fields: dict[str, Any] = {}
    for ours, names in ALIASES.items():
        value = next((record[name] for name in names if not _absent(record.get(name))), None)
        fields[ours] = [value] if ours in _LISTS and isinstance(value, str) else value
    fields["locality"] = _locality(record)
    fields["portability"] = _probe_groups(record.get("portability")) or _consequences(record)
    return fields


def known_names() -> frozenset[str]:
    """Return all names of all fields, those of evaluation prompts included."""
    probes = {"loc", "loc_ans", "locality_prompt", "locality_ground_truth", "mhop", "mhop_ans", "personas"}
    return frozenset(name for names in ALIASES.values() for name in names) | probes | {*_EVALUATED}


def unknown_fields(record: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the fields of a record that nothing reads, each with a known one of a similar name, if there is one.

    A benchmark's records have many such, and of them none is named.
    """
    if any(name in record for name in _BENCHMARK_FIELDS):
        return {}
    known = [*_EVALUATED, *(name for names in ALIASES.values() for name in names)]
    meant = {name: get_close_matches(name.lower(), known, n=1, cutoff=0.75) for name in record if name not in known}
    return {name: next(iter(close), None) for name, close in meant.items()}


def misspelt(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a field with a name like that of a deciding one which the record lacks, and the name of that one."""
    found = unknown_fields(record).items()
    return next(((name, meant) for name, meant in found if meant in _DECISIVE and meant not in record), None)


def _locality(record: Mapping[str, Any]) -> Any:
    for prompt, answer in (("loc", "loc_ans"), ("locality_prompt", "locality_ground_truth")):
        if prompt in record and answer in record:
            # The published files hold a few records without an answer: there is nothing to measure there.
            pair = {"prompt": record[prompt], "answer": record[answer]}
            return [] if any(map(_blank, pair.values())) else [pair]
    return _probe_groups(record.get("locality"))


def _consequences(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """WikiBigEdit asks as a persona would, and for what follows in a second step."""
    pairs = [(record.get("personas"), record.get("ans")), (record.get("mhop"), record.get("mhop_ans"))]
    return [
        {"prompt": prompt, "answer": answer} for prompt, answer in pairs if not _blank(prompt) and not _blank(answer)
    ]


def _blank(value: Any) -> bool:
    return _absent(value) or (isinstance(value, str) and not value.strip())


def _absent(value: Any) -> bool:
    """Return whether a field is left out: null, or the not-a-number that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _probe_groups(value: Any) -> Any:
    """KnowEdit and EasyEdit group evaluation prompts by kind and call the answer ``ground_truth``.

    A group is a list of prompts each with its answer, or one object, whose prompts and answers may be lists.
    """
    if isinstance(value, Mapping) and "prompt" in value:
        value = _paired(value)
    elif isinstance(value, Mapping):
        groups = (_paired(group) if isinstance(group, Mapping) else group for group in value.values())
        value = [prompt for group in groups for prompt in group]
    if not isinstance(value, list):
        return value
    return [_probe(item) for item in value]


def _paired(group: Mapping[str, Any]) -> list[Any]:
    """Return the prompts of one object, each with its answer."""
    prompts, answers = group.get("prompt"), group.get("ground_truth", group.get("answer"))
    if not isinstance(prompts, list):
        return [group]
    if not isinstance(answers, list) or len(prompts) != len(answers):
        given = len(answers) if isinstance(answers, list) else "no list of"
        raise ValueError(f"a group of evaluation prompts has {len(prompts)} prompts and {given} answers; pair them")
    return [{"prompt": prompt, "ground_truth": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def _probe(item: Any) -> Any:
    """Return a benchmark's question as an object with ``prompt`` and ``answer``, from its alternatives the first."""
    if not isinstance(item, Mapping):
        return item
    for prompt, answered in (("prompt", "ground_truth"), ("loc", "loc_ans")):
        if answered in item:
            answer = item[answered]
            while isinstance(answer, list) and answer:  # alternatives, of which the first is the usual one
                answer = answer[0]
            return {"prompt": item.get(prompt), "answer": answer}
    return item
