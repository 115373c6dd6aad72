"""A type that transformers lacks: norms behind its parts, odd names, attention and a recurrent state in turn.

The file is self-contained, as it is saved beside the weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class TomorrowConfig(PretrainedConfig):
    model_type = "tomorrow"

    def __init__(self, vocab_size: int = 97, num_hidden_layers: int = 5, **named: Any) -> None:
        self.vocab_size, self.num_hidden_layers, self.hidden_size, self.inner = vocab_size, num_hidden_layers, 32, 48
        super().__init__(**{"tie_word_embeddings": False, **named})


class Gauge(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        return self.size * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


class Looker(nn.Module):
    """Attention, in which near tokens count more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, states: Tensor, mask: Tensor | None, cache: Any, number: int) -> Tensor:
        q, k, v = (one(states).unflatten(-1, (4, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v, number)
        now, all_tokens = q.shape[2], k.shape[2]
        seen = torch.ones(now, all_tokens, dtype=torch.bool).tril(all_tokens - now)[None, None]
        seen = seen if mask is None else seen & mask[:, None, None, -all_tokens:].bool()
        place = torch.arange(all_tokens)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + 0.3 * (place - place[-now:, None])
        read = torch.softmax(scores.masked_fill(~seen, -1e4), -1) @ v
        return self.o(read.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Drifter(nn.Module):
    """A recurrent state, which padding leaves as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.gate, self.back = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, states: Tensor, mask: Tensor | None, cache: Any, number: int) -> Tensor:
        given, gate = self.into(states), torch.sigmoid(self.gate(states))
        if mask is not None:
            here = mask[:, -states.shape[1] :, None].to(states.dtype)
            gate = gate * here + 1 - here
        kept = {} if cache is None else cache.__dict__.setdefault("drift", {})
        state, found = kept.get(number, torch.zeros_like(given[:, 0])), []
        for place in range(states.shape[1]):
            state = gate[:, place] * state + (1 - gate[:, place]) * given[:, place]
            found.append(state)
        kept[number] = state
        if cache is not None:  # so that every layer of the cache has the same length
            nothing = states.new_zeros(len(states), 1, states.shape[1], 1)
            cache.update(nothing, nothing, number)
        return self.back(torch.stack(found, 1))  # type: ignore[no-any-return]


class Stage(nn.Module):
    def __init__(self, config: TomorrowConfig, number: int) -> None:
        super().__init__()
        self.number, width = number, config.hidden_size
        self.mix = Drifter(width) if number % 2 else Looker(width)
        self.up, self.fall = nn.Linear(width, config.inner), nn.Linear(config.inner, width)
        self.first, self.second = Gauge(width), Gauge(width)

    def forward(self, states: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        states = states + self.first(self.mix(states, mask, cache, self.number))
        return states + self.second(self.fall(torch.relu(self.up(states))))  # type: ignore[no-any-return]


class TomorrowBase(PreTrainedModel):
    config_class = TomorrowConfig
    base_model_prefix = "core"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.2)
        if isinstance(module, Gauge):
            nn.init.ones_(module.size)


class TomorrowModel(TomorrowBase):
    def __init__(self, config: TomorrowConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(Stage(config, number) for number in range(config.num_hidden_layers))
        self.last = Gauge(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **given: Any
    ) -> BaseModelOutputWithPast:
        cache = next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)
        cache = DynamicCache() if use_cache and cache is None else cache
        states = self.words(input_ids)
        for stage in self.stages:
            states = stage(states, attention_mask, cache)
        return with_cache(BaseModelOutputWithPast(last_hidden_state=self.last(states)), cache)


class TomorrowForCausalLM(TomorrowBase, GenerationMixin):
    def __init__(self, config: TomorrowConfig) -> None:
        super().__init__(config)
        self.core = TomorrowModel(config)
        self.say = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.core.words

    def get_output_embeddings(self) -> nn.Module:
        return self.say

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        output = self.core(input_ids, attention_mask, **given)
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        return with_cache(CausalLMOutputWithPast(logits=self.say(output.last_hidden_state)), cache)


def with_cache(output: Any, cache: Any) -> Any:
    """An output with its cache, by the name that this version of transformers has for it."""
    setattr(output, "cache" if hasattr(output, "cache") else "past_key_values", cache)
    return output
