"""Checks that an engine has kept the memory of a checkpoint. Needs torch only; exports carry this very file."""

from torch import nn

from wisecli.routing.layers.routed_layer import Routed

# How engines call the attention that they have a model built with. All pack several requests' tokens into a row.
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI"}
# What else there is to do in some of them.
_INSTEAD = {"vLLM": '`pip install "wisecli[vllm]"` in its environment (and no --model-impl), or '}


class LostMemoryError(RuntimeError):
    """Raised where a model would answer without its memory."""


def require_transformers(attention: str | None) -> None:
    """Check, by the name of a model's attention, that transformers runs it and no other engine.

    Raises:
        LostMemoryError: an engine does, and would not say where the prompts end that it packs into one row.
    """
    found = (engine for name, engine in _ENGINES.items() if attention is not None and attention.startswith(name))
    if engine := next(found, None):
        raise LostMemoryError(
            f"this checkpoint decides once a prompt which edit answers it, and {engine} packs the prompts of many "
            f"requests into one row: {_INSTEAD.get(engine, '')}serve what `wise export --format stock` writes of the "
            "same memory"
        )


def require_memory(model: nn.Module, module: str) -> None:
    """Check that a loaded model has a memory at path ``module``, and that its tensors were loaded.

    Nothing is checked of weights that are elsewhere: on another machine, or not in memory.

    Raises:
        LostMemoryError: saying what stands in its place, or what is wrong.
    """
    memory = model.get_submodule(module)
    if not isinstance(memory, Routed):
        raise LostMemoryError(f"the edits are lost: {type(memory).__name__} was put in the place of {module}")
    tensors = [tensor for tensor in memory.buffers() if tensor.is_floating_point() and not tensor.is_meta]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise LostMemoryError(f"the edits are lost: the memory of {module} was not loaded")
