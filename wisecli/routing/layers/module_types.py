"""Adds behaviour to modules of a loaded model by subclassing their classes. Needs torch only; exports carry this.

An architecture's own classes stay what they are: one module of a model gets a type of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def accepted_arguments(kind: Any, named: dict[str, Any]) -> dict[str, Any]:
    """Return those of some arguments that the ``forward`` of a model's class takes."""
    return {name: value for name, value in named.items() if name in arguments_of(kind)}


@functools.cache
def arguments_of(kind: Any) -> tuple[str, ...]:
    """Return the names of the arguments that the ``forward`` of a model's class takes."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class ModuleMixin(nn.Module):
    """Behaviour added to a module; in the subclass it stands before the module's own class."""


# What passes and `generate()` are given of prompts that are decided already.
ANSWERING = "wise_answering"
# What others look at to learn what a model takes.
_SHOWN = ("forward", "prepare_inputs_for_generation")


class SignatureMixin(ModuleMixin):
    """A mixin whose methods show the signatures of the class that they override."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _SHOWN:
            own = [one for one in cls.__mro__ if name in one.__dict__ and one is not nn.Module]
            behind = next((one for one in own if not issubclass(one, ModuleMixin)), None)
            if behind is not None and issubclass(own[0], ModuleMixin):
                setattr(cls, name, _shown_as(getattr(cls, name), getattr(behind, name)))


def _shown_as(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that shows the signature of the original one."""

    @functools.wraps(original)
    def shown(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    shown.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return shown


def add_mixin(module: nn.Module, role: type[ModuleMixin]) -> None:
    """Change a module's class to a subclass of it that has the behaviour of ``role``, too."""
    if not isinstance(module, role):
        module.__class__ = mixed_type(type(module), role)


def mixed_type(kind: Any, role: Any) -> Any:
    """Return the subclass of ``kind`` with the behaviour of ``role``; always the same one."""
    return _made(kind, role)


@functools.cache
def _made(kind: Any, role: Any) -> Any:
    # Where a model is spread over devices, layers are known by their types' names.
    return type(kind.__name__, (role, kind), {"__module__": kind.__module__, "__reduce_ex__": _reduced(kind, role)})


def _reduced(kind: type[nn.Module], role: type[ModuleMixin]) -> Callable[[Any, int], tuple[Any, ...]]:
    def reduce(self: nn.Module, _protocol: int) -> tuple[Any, ...]:
        return _restored, (kind, role), self.__dict__

    return reduce


def _restored(kind: type[nn.Module], role: type[ModuleMixin]) -> nn.Module:
    made = mixed_type(kind, role)
    module: nn.Module = made.__new__(made)
    return module
