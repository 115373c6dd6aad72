"""Adds behaviour to modules of a loaded model by subclassing their classes. Needs torch only; exports carry this.

An architecture's own classes stay what they are: one module of a model gets a type of its own.
"""

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
            own = [base for base in cls.__mro__ if name in base.__dict__ and base is not nn.Module]
            behind = next((base for base in own if not issubclass(base, ModuleMixin)), None)
            if behind is not None and issubclass(own[0], ModuleMixin):
                setattr(cls, name, _shown_as(getattr(cls, name), getattr(behind, name)))


def _shown_as(method: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that shows the signature of the original one."""

    @functools.wraps(original)
    def shown(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    shown.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return shown


def add_mixin(module: nn.Module, role: Any) -> None:
    """Change a module's class to a subclass that also has the behaviour of ``role``, a :class:`ModuleMixin`."""
    kind: Any = type(module)
    if not isinstance(module, role):
        module.__class__ = mixed_type(kind, role)


@functools.cache
def mixed_type(kind: Any, role: Any) -> Any:
    """Return the subclass of ``kind`` with the behaviour of ``role``, the same one each time."""
    # Where a model is spread over devices, layers are known by their types' names.
    own = {"__module__": kind.__module__, "__reduce_ex__": reduce_by(mixed_type, kind, role)}
    return type(kind.__name__, (role, kind), own)


def reduce_by(make: Callable[..., Any], *arguments: Any) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Return the ``__reduce_ex__`` of a class that ``make(*arguments)`` gives: its objects are pickled with that call.

    Args:
        make: a function of a module, so that pickle finds it by its name.
    """

    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        return _empty, (make, *arguments), self.__dict__

    return reduce


def _empty(make: Callable[..., Any], *arguments: Any) -> Any:
    """Return an object of the class that ``make(*arguments)`` gives, which pickle then fills."""
    made = make(*arguments)
    return made.__new__(made)
