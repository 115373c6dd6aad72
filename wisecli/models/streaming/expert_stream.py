"""Mixtures of experts that do not fit in memory: what each expert computes with is read when tokens are sent to it.

In the place of a parameter with an entry an expert stands an object that gives one entry at a time. Most types loop
over the experts that tokens are sent to and index it; grouped and batched products of all experts become a product an
expert, which gives the same bits. For gradients an entry is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from wisecli.environment import return_freed_memory
from wisecli.models.streaming.layer_files import aligned


class Room:
    """A buffer in which entries stay: the first that are read, as many as there is room for.

    Attributes:
        size: bytes of it.
    """

    def __init__(self) -> None:
        self.size = self._used = 0
        self._kept: dict[tuple[Entries, int], Tensor] = {}
        self._buffer: Tensor | None = None

    def get(self, entries: Entries, number: int) -> Tensor | None:
        """Return an entry that has stayed."""
        return self._kept.get((entries, number))

    def keep(self, entries: Entries, number: int, entry: Tensor) -> Tensor | None:
        """Return an entry as it stays; ``None`` if there is no room for it."""
        end = self._used + entry.nbytes
        if end > self.size:
            return None
        if self._buffer is None:
            self._buffer = torch.empty(self.size, dtype=torch.uint8, device=entry.device)
        kept = self._buffer[self._used : end].view(entry.dtype).view(entry.shape)
        self._kept[entries, number] = kept.copy_(entry)
        self._used = aligned(end)
        return kept

    def clear(self) -> None:
        """Let all entries go."""
        self._kept, self._used = {}, 0

    def free(self) -> None:
        """Let all entries go, and the buffer."""
        self.clear()
        self._buffer = None


class Entries:
    """The entries of a parameter (E, …), one an expert, of which the last that was read is held, if it does not stay.

    Args:
        read: reads one, to where the layer runs.
        room: where others stay.
    """

    def __init__(self, parameter: Tensor, read: Callable[[int], Tensor], room: Room) -> None:
        self.shape, self.dtype, self._read, self.room = parameter.shape, parameter.dtype, read, room
        self._last: tuple[int, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Size of all."""
        return self.shape.numel() * self.dtype.itemsize

    def entry(self, number: int) -> Tensor:
        """Return an expert's entry."""
        kept = self.room.get(self, number)
        if kept is not None:
            return kept
        if self._last is None or self._last[0] != number:
            self._last = None  # which frees it before another is read
            entry = self._read(number)
            kept = self.room.keep(self, number, entry)
            if kept is not None:
                return kept
            self._last = number, entry
        return self._last[1]

    def forget(self) -> None:
        """Let the last entry go."""
        self._last = None

    def read_again(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        """Return what gives a tensor anew, if its numbers are those of the last entry, which does not stay."""
        if self._last is None or tensor.untyped_storage().data_ptr() != self._last[1].untyped_storage().data_ptr():
            return None
        number, place = self._last[0], (tensor.size(), tensor.stride(), tensor.storage_offset())
        return lambda: self._read(number).as_strided(*place)


class ExpertWeights:
    """Stands for a parameter whose entries are read one by one.

    Args:
        transposed: whether the last two axes are exchanged.
    """

    def __init__(self, entries: Entries, device: torch.device, *, transposed: bool = False) -> None:
        self.entries, self.device, self.transposed = entries, device, transposed
        size = list(entries.shape)
        self.shape = torch.Size([size[0], size[2], size[1]] if transposed else size)
        self.dtype, self.ndim = entries.dtype, len(size)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        numbers = isinstance(index, Tensor) and index.dtype != torch.bool
        if isinstance(index, int) or (numbers and not index.dim()):
            return self._entry(int(index))
        if not numbers:
            return self.whole()[index]
        needed, places = index.unique(return_inverse=True)
        return torch.stack([self._entry(number) for number in needed.tolist()])[places]

    def transpose(self, first: int, second: int) -> ExpertWeights | Tensor:
        """Exchange two axes."""
        if {first % self.ndim, second % self.ndim} == {1, 2}:
            return ExpertWeights(self.entries, self.device, transposed=not self.transposed)
        return self.whole().transpose(first, second)

    def whole(self) -> Tensor:
        """Return all entries together, for what takes them no other way."""
        return torch.stack([self._entry(number) for number in range(len(self))])

    def data_ptr(self) -> int:
        """Return an address that is aligned, as those of the entries are: products ask for it."""
        return 0

    def _entry(self, number: int) -> Tensor:
        entry = self.entries.entry(number)
        return entry.mT if self.transposed else entry

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _types: Any, args: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named, kind = named or {}, getattr(function, "__name__", "")
        if len(args) > 1 and isinstance(args[1], cls) and isinstance(args[0], Tensor):
            if "grouped_mm" in kind:
                return args[1]._grouped(function, *args, **named)
            if kind == "bmm":
                return args[1]._batched(args[0])
        return function(*(one.whole() if isinstance(one, cls) else one for one in args), **named)

    def _grouped(self, product: Callable[..., Tensor], rows: Tensor, _: Any, offs: Tensor, **named: Any) -> Tensor:
        """Return the product (S, out) of rows (S, in), sorted by experts, whose ends ``offs`` (E,) says."""
        ends = [0, *offs.tolist()]
        sent = [(number, start, end) for number, (start, end) in enumerate(pairwise(ends)) if end > start]

        def of_expert(number: int, start: int, end: int) -> Tensor:
            return product(rows[start:end], self._entry(number)[None], offs=offs.new_tensor([end - start]), **named)

        found = rows.new_zeros(len(rows), self.shape[2], dtype=self.dtype)
        if torch.is_grad_enabled() and rows.requires_grad:
            return torch.cat([*(of_expert(*one) for one in sent), found[ends[-1] :]])
        for number, start, end in sent:
            found[start:end] = of_expert(number, start, end)
        return found

    def _batched(self, rows: Tensor) -> Tensor:
        """Return the product (E, S, out) of rows (E, S, in); without gradients nothing is read for rows of zeros."""
        spared = not torch.is_grad_enabled()
        return torch.cat(
            [
                rows.new_zeros(1, rows.shape[1], self.shape[2])
                if spared and not own.any()
                else torch.bmm(own, self._entry(number)[None])
                for number, own in enumerate(rows.split(1))
            ]
        )


def read_by_expert(layer: nn.Module, found: Mapping[str, Entries], device: torch.device) -> None:
    """Let a layer read the entries of some of its parameters when it runs.

    Args:
        found: by the parameters' names.
    """
    modules: dict[nn.Module, list[Entries]] = {}
    for name, entries in found.items():
        path, _, own = name.rpartition(".")
        module = layer.get_submodule(path)
        module.__dict__[own] = ExpertWeights(entries, device)
        modules.setdefault(module, []).append(entries)
    for module, own_entries in modules.items():
        module.__dict__["forward"] = _forward(module, own_entries)


def _forward(module: nn.Module, own: Sequence[Entries]) -> Callable[..., Any]:
    """Return a module's forward pass that keeps no entries, not even for gradients."""

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        return next((again for entries in own if (again := entries.read_again(tensor)) is not None), tensor)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    def forward(*args: Any, **named: Any) -> Any:
        try:
            with saved_tensors_hooks(pack, unpack):
                return type(module).forward(module, *args, **named)
        finally:
            for entries in own:
                entries.forget()
            return_freed_memory()

    return forward
