"""The arguments of a model's ``forward`` by their names. Needs torch only; exports carry this very file."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from wisecli.routing.layers.module_types import arguments_of

Function = TypeVar("Function", bound=Callable[..., Any])


def eager_only(function: Function) -> Function:
    """Decorate a function so that compiled graphs leave it out."""
    uncompiled: Function = torch.compiler.disable(function)
    return uncompiled


@eager_only
def named_arguments(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a ``forward`` by their names."""
    return {**dict(zip(arguments_of(kind), args, strict=False)), **kwargs}
