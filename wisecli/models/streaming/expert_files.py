"""How transformers puts a parameter of all experts together from tensors of each, and the same for one expert alone.

A checkpoint mostly keeps a tensor an expert (``experts.7.up_proj.weight``), and a model one parameter with an entry an
expert, which the steps of a converter make of them. They are taken where one expert's tensors alone give its entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.module_tree import expert_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

# Sides of the tensors that a converter's steps are tried on.
_SIDES = (4, 6)


@dataclass(frozen=True)
class Assembly:
    """How the entries of a parameter are made: names of tensors, one an expert, by the converter's patterns."""

    name: str
    parts: Mapping[str, Sequence[str]]
    converter: WeightConverter

    def of_expert(self, number: int) -> list[str]:
        """Return the names of an expert's tensors, in the order of the patterns."""
        return [names[number] for names in self.parts.values()]

    def joined(self, tensors: Iterable[Sequence[Tensor]]) -> Tensor:
        """Return the entries (n, …) that tensors of n experts make, given for each pattern."""
        found: dict[str, Any] = {pattern: list(some) for pattern, some in zip(self.parts, tensors, strict=True)}
        patterns = {"source_patterns": self.converter.source_patterns}
        patterns |= {"target_patterns": self.converter.target_patterns}
        for step in self.converter.operations:
            found = step.convert(found, **patterns, full_layer_name=self.name)
        (value,) = found.values()
        joined: Tensor = value[0] if isinstance(value, list) else value
        return joined

    def is_separable(self) -> bool:
        """Return whether one expert's tensors alone give what all experts' do for it; tried on small tensors."""
        count = len(next(iter(self.parts.values())))
        drawn = [[torch.randn(_SIDES) for _ in range(count)] for _ in self.parts]
        try:
            whole = self.joined(drawn)
            return len(whole) == count and all(
                torch.equal(whole[number : number + 1], self.joined([each[number]] for each in drawn))
                for number in range(count)
            )
        except Exception:  # of steps that need what a tensor alone does not tell
            return False


def assemblies(model: PreTrainedModel, layers: str, checkpoint: Checkpoint) -> dict[str, Assembly]:
    """Return by name how parameters of experts are put together, where one expert's can be; none of a quantised model.

    Args:
        model: on the meta device.
        layers: module path of the list of layers.
    """
    wanted = {f"{layers}.{name}": len(one) for name, one in expert_parameters(model.get_submodule(layers)).items()}
    if not wanted or getattr(model.config, "quantization_config", None) is not None:
        return {}
    found: dict[str, Assembly] = {}
    separable: dict[tuple[str, ...], bool] = {}
    for name, (converter, parts) in _sources(model, checkpoint).items():
        ordered = {pattern: parts[pattern] for pattern in converter.source_patterns if pattern in parts}
        if len(converter.target_patterns) > 1 or {len(names) for names in ordered.values()} != {wanted.get(name)}:
            continue
        assembly, kind = Assembly(name, ordered, converter), tuple(converter.source_patterns)
        if kind not in separable:
            separable[kind] = assembly.is_separable()
        if separable[kind]:
            found[name] = assembly
    return found


def _sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, tuple[WeightConverter, dict[str, list[str]]]]:
    """Return the converter of each parameter that one makes, and what it makes it of, as transformers pairs them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    names = dict.fromkeys(name for name, _ in model.named_parameters())
    state = model.state_dict()
    found: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    for name in sorted(checkpoint, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and target in names:
            found.setdefault(target, (by_pattern[pattern], defaultdict(list)))[1][pattern].append(name)
    return found
