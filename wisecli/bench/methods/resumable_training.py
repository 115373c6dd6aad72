"""A training over several passes that can be kept between two of them and gone on with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from wisecli.models.prompts.tokenization import Row

Item = TypeVar("Item")


class Training:
    """Rows, an optimizer of the tensors that are trained on them, and how many passes over them are ``done``."""

    def __init__(self, rows: Sequence[Row], optimizer: Optimizer, done: int = 0) -> None:
        self.rows, self.optimizer, self.done = tuple(rows), optimizer, done

    def shuffled(self, items: Sequence[Item], passes: int, rng: random.Random) -> Iterator[list[Item]]:
        """Yield the items in a new order for each pass that is left; the caller counts a pass as done."""
        order = list(items)
        for number in range(passes):
            rng.shuffle(order)
            if number >= self.done:
                yield list(order)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it but the trained tensors themselves."""
        moments = self.optimizer.state_dict()["state"]
        return {
            **packed("training", self.rows),
            "training done": torch.tensor(self.done),
            **{f"moments {index} {name}": value for index, own in moments.items() for name, value in own.items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], optimizer: Optimizer) -> Training | None:
        """Return what was kept, with a new optimizer of the same tensors; ``None`` where no training was on its way."""
        if "training done" not in tensors:
            return None
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("moments "):
                _, index, own = name.split(" ")
                whole["state"].setdefault(int(index), {})[own] = value
        optimizer.load_state_dict(whole)
        return cls(unpacked("training", tensors), optimizer, int(tensors["training done"]))


def packed(name: str, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as two tensors: all tokens one after the other, and the lengths (n, 2) of prompts and targets."""
    tokens = [token for row in rows for token in (*row.prompt, *row.target)]
    lengths = [(len(row.prompt), len(row.target)) for row in rows]
    return {
        f"{name} tokens": torch.tensor(tokens, dtype=torch.long),
        f"{name} lengths": torch.tensor(lengths, dtype=torch.long).view(-1, 2),
    }


def unpacked(name: str, tensors: Mapping[str, Tensor]) -> list[Row]:
    """Return the rows that :func:`packed` made into tensors."""
    lengths = tensors[f"{name} lengths"]
    parts = iter(tensors[f"{name} tokens"].split(lengths.flatten().tolist()))
    return [Row(tuple(prompt.tolist()), tuple(target.tolist())) for prompt, target in zip(parts, parts, strict=True)]
