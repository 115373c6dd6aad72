"""Values that the shell completes. What is registered in modules that import torch is named here once more."""

from collections.abc import Callable, Sequence

Completer = Callable[[str], list[str]]

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Those that `wise fetch` gets, and of them those whose questions `wise eval` asks.
MODELS = ("smollm2-135m",)
DATASETS = ("zsre", "counterfact", "wikibigedit")
# What `wise bench` edits with besides: their records come as files.
FILED_DATASETS = ("hallucination", "temporal")
MERGE_METHODS = ("ties", "linear", "sign", "magnitude", "dare", "dare-ties", "slerp", "exact")
BENCH_METHODS = (
    *("wise", "wise-retrieve", "wise-paper", "alphaedit", "crispedit", "defer", "ft-l", "ft-ewc", "grace", "icl"),
    *("knn", "lora", "lora-paraphrased", "memit", "memit-mass", "memoir", "mend", "rag", "rag-hybrid", "rag-shots"),
    *("rome", "serac", "ultraedit"),
)
STUDIES = ("router", "layers", "shards", "merge", "scaling", "latency")


def forms_named(incomplete: str) -> list[str]:
    """Return the forms that prompts are asked in, and groups of them, as :func:`some_of` completes names."""
    from wisecli.models.prompts.prompt_forms import forms

    return some_of(("all", "trained", "unseen", "none", *(form.label for form in forms().values())))(incomplete)


def kinds_named(incomplete: str) -> list[str]:
    """Return the kinds of prompts around an edit, and groups of them, as :func:`some_of` completes names."""
    from wisecli.models.prompts.prompt_kinds import kinds

    return some_of(("all", "asked", "mentioned", "none", *(kind.label for kind in kinds().values())))(incomplete)


def one_of(names: Sequence[str]) -> Completer:
    """Return a completer of one name."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def some_of(names: Sequence[str]) -> Completer:
    """Return a completer of names with commas between: it completes the last one, and proposes none twice."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        left = [name for name in names if name not in before.split(",")]
        return [f"{before}{comma}{name}" for name in left if name.startswith(last)]

    return complete
