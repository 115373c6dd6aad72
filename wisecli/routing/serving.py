"""What an engine that serves a checkpoint must leave as it is. Needs torch only; exports carry this very file.

Engines put faster modules in the place of a model's own, and some do so by a module's type alone. A routed matrix that
was replaced, or is passed by, leaves a model that answers as if nothing had been edited. So the block around it has a
type of its own, and :func:`require_memory` looks, once a model is loaded, whether the memory is really in it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .passes import Override, overridden_by
from .side_memory import RoutedMatrix

Own = TypeVar("Own", bound="Served")

# How engines call the attention that they have a model built with. All of them pack the tokens of several requests into
# one row.
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI"}
# What else there is to do in some of them.
_INSTEAD = {"vLLM": '`pip install "wisecli[vllm]"` in its environment (and no --model-impl), or '}
# What vLLM leaves where another process has a layer.
_ELSEWHERE = ("PPMissingLayer", "StageMissingLayer")
# So many of the memory's keys are tried.
_TRIED = 32
# By how much of an update, and of what it is added to, rounding may change what is seen of it.
_OF_UPDATE, _OF_ANSWER = 0.05, 0.005


class LostMemoryError(RuntimeError):
    """A model would answer without its memory."""


def engine_of(attention: str | None) -> str | None:
    """The engine that a model is built for, by the name of its attention; ``None`` if transformers itself runs it."""
    found = (engine for name, engine in _ENGINES.items() if attention is not None and attention.startswith(name))
    return next(found, None)


def require_decision_per_token(routing: str, engine: str | None) -> None:
    """Check that requests packed into one row can be told apart.

    Raises:
        LostMemoryError: prompts decide, and the engine does not say where they end.
    """
    if engine is not None and routing != "token":
        raise LostMemoryError(
            f"this checkpoint decides once a prompt which edit answers it, and {engine} packs the prompts of many "
            f"requests into one row: {_INSTEAD.get(engine, '')}merge the same shards with "
            "`wise merge --routing token`, and export that memory"
        )


def set_apart(model: nn.Module, module: str) -> None:
    """Give the block around the matrix at path ``module`` a type of its own, which computes the same.

    What an engine finds out about the other layers' blocks, by their type, is then not taken to be true of this one.
    """
    block = model.get_submodule(module.rpartition(".")[0])
    kind = type(block)
    name = f"Edited{kind.__name__}"
    own = globals().get(name)
    if own is None or own.__bases__ != (kind,):
        own = type(name, (kind,), {"__module__": __name__})
        globals()[name] = own  # where pickle looks for it
    block.__class__ = own


class Served(nn.Module):
    """A model that checks its memory when an engine, having loaded and changed it, turns it to evaluation.

    ``wise_module`` is the routed matrix' path in it, ``wise_engine`` what it was built for.
    """

    wise_module: str
    wise_engine: str | None = None

    def train(self: Own, mode: bool = True) -> Own:
        """As every module; the last that engines do to a model before it answers is to call ``eval()``."""
        done = super().train(mode)
        if not mode and self.wise_engine is not None:
            require_memory(self, self.wise_module)
        return done


def require_memory(model: nn.Module, module: str) -> None:
    """Check that the matrix at path ``module`` of a loaded model is routed, is asked, and finds what it holds.

    Nothing is checked of weights that are elsewhere: on another machine, or not in memory.

    Raises:
        LostMemoryError: saying what stands in its place, or what is wrong.
    """
    where = model
    for name in module.split("."):
        if type(where).__name__ in _ELSEWHERE:
            return
        inside = getattr(where, name, None)
        if not isinstance(inside, nn.Module):
            raise LostMemoryError(f"the edits are lost: {type(where).__name__} has no {name} (of {module})")
        block, where = where, inside
    if not isinstance(where, RoutedMatrix):
        raise LostMemoryError(f"the edits are lost: {type(where).__name__} was put in the place of {module}")
    if any(tensor.is_meta for tensor in (*where.parameters(), *where.buffers())):
        return
    with torch.no_grad():
        _require_found(where, module)
        if not module.rpartition(".")[0].rpartition(".")[2].isdecimal():  # a whole layer asks for more than states
            _require_asked(block, where, module)


def _require_found(matrix: RoutedMatrix, module: str) -> None:
    """Check that one of the memory's own keys gets what the memory adds to it."""
    keys = own_keys(matrix)
    if not len(keys):
        return
    if not keys.isfinite().all():
        raise LostMemoryError(f"the edits are lost: the memory of {module} was not loaded")
    if matrix.routing != "token":  # what it adds depends on the prompt that was read
        return
    strength, place = matrix.nearest(keys[None])
    best = int(strength.argmax())
    key, found = keys[best][None, None], place[:, best : best + 1]
    forced = None if strength[0, best] > 1 else int(matrix.memory_at(found))
    plain = matrix.main(key).float()
    wanted = matrix.recall(key, found) if matrix.kind == "lookup" else matrix.update(key, int(found))
    with overridden_by(Override(forced=forced)):
        given = matrix(key).float() - plain
    rounding = _OF_UPDATE * wanted.float().norm() + _OF_ANSWER * plain.norm()
    if not bool((given - wanted.float()).norm() <= rounding):
        raise LostMemoryError(f"the edits are lost: a key of the memory of {module} does not find itself")


def own_keys(matrix: RoutedMatrix) -> Tensor:
    """Some of the keys that a memory answers (n, d_ff), of length 1, in the type of the matrix."""
    if matrix.router == "norm":
        # Along its largest row a change is no less than that row.
        rows = matrix.delta.float().flatten(0, 1)
        row = int(rows.norm(dim=-1).argmax()) if len(rows) else 0
        memory = row // max(1, matrix.delta.shape[1])
        keys = matrix.weight.new_zeros(min(1, len(rows)), _width(matrix), dtype=torch.float32)
        keys[:, matrix.columns[memory]] = rows[row : row + 1]
    else:
        keys = _unwhitened(matrix)
    lengths = keys.norm(dim=-1, keepdim=True)
    keys = (keys / lengths.clamp(min=1e-12)).to(matrix.weight.dtype)
    some: Tensor = keys[(lengths.flatten() > 0) | lengths.flatten().isnan()]
    return some


def _unwhitened(matrix: RoutedMatrix) -> Tensor:
    """``P⁻¹`` of some of the stored keys ``P e``, by the formula of Woodbury: (n, d_ff)."""
    step = max(1, len(matrix.probes) // _TRIED)
    probes, metric = matrix.probes[::step].float(), matrix.metric[::step]
    directions, gains, floors = (getattr(matrix, name).float() for name in ("directions", "gains", "floors"))
    keys = []
    for probe, kind in zip(probes, metric.tolist(), strict=True):
        along, floor = directions[kind], floors[kind]
        # (f + DᵀGD)⁻¹ = 1/f - Dᵀ (f + G D Dᵀ)⁻¹ G D / f, which no gain of nought divides by.
        inner = floor * torch.eye(len(along), device=along.device) + gains[kind][:, None] * (along @ along.T)
        keys.append((probe - along.T @ torch.linalg.solve(inner, gains[kind] * (along @ probe))) / floor)
    return torch.stack(keys) if keys else probes


def _width(matrix: RoutedMatrix) -> int:
    return int(matrix.weight.shape[0 if matrix.transposed else 1])


def _require_asked(block: nn.Module, matrix: RoutedMatrix, module: str) -> None:
    """Check that what goes through the block goes through the matrix, and that whole keys come there."""
    widths: list[int] = []

    def note(_matrix: nn.Module, inputs: tuple[Any, ...], _named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        widths.append(inputs[0].shape[-1])
        raise _SeenError

    size = matrix.weight.shape[1 if matrix.transposed else 0]
    states = torch.linspace(-1, 1, size, device=matrix.weight.device, dtype=matrix.weight.dtype)
    handle = matrix.register_forward_pre_hook(note, with_kwargs=True)
    try:
        block(states.expand(1, 2, size).contiguous())
    except _SeenError:
        pass
    finally:
        handle.remove()
    if not widths:
        raise LostMemoryError(f"the edits are lost: {type(block).__name__} does not ask {module}")
    if widths != [_width(matrix)]:
        raise LostMemoryError(
            f"the edits are lost: {module} is given {widths[0]} of the {_width(matrix)} numbers of a key, "
            "as if it were split; serve without tensor parallelism"
        )


class _SeenError(Exception):
    """Ends a pass that has shown enough."""
