"""What a base model makes of a token after made-up questions that a number may answer: read once, then cached."""

import random
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.artifacts.tensor_schema import TOKEN_PROBE, require_layout
from wisecli.data.corpus import made_up_subjects, relations
from wisecli.errors import DamagedFileError
from wisecli.io.checkpoint import keep_in_cache, load_tensors, save_tensors
from wisecli.io.digest import sha256_json
from wisecli.io.user_cache import cache_path
from wisecli.models.layout.site import Site
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import Row, collate, in_batches
from wisecli.models.running.activations import Activations, captured
from wisecli.models.running.quick_products import quick_products

# Whenever other numbers would be found for the same model, this changes.
_VERSION = 3
_ASKED = 32
_NUMBER = ("When ", " year", " date")


class TokenProbe:
    """What a model makes of tokens that end questions.

    Args:
        identity: of the base model, for the cache; nothing is cached without.
    """

    def __init__(self, loaded: Loaded, site: Site, batch_size: int, identity: str | None = None) -> None:
        self.loaded, self.site, self.batch_size, self.identity = loaded, site, batch_size, identity
        self._known: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def keys_after_questions(self, token: int, form: str = "{}") -> tuple[Tensor, Tensor]:
        """Return keys (Q, d_ff) and lengths of states (Q,) of a token after Q questions in a form."""
        if (token, form) not in self._known:
            self._known[token, form] = self._cached(token, form)
        return self._known[token, form]

    def _cached(self, token: int, form: str) -> tuple[Tensor, Tensor]:
        """Return the keys (n, d_ff) and state norms (n,) of a token after questions, from the cache if known."""
        texts = [form.replace("{}", text) for text in _questions()]
        if self.identity is None:
            return self._read(token, texts)
        model = self.loaded.model
        about = [self.identity, self.site.as_dict(), str(model.dtype), self.loaded.device.type, token, texts, _VERSION]
        path = cache_path("behind") / f"{sha256_json(about)[:32]}.safetensors"
        with suppress(DamagedFileError):
            found = load_tensors(path)
            require_layout(path, found, TOKEN_PROBE, {"n": len(texts), "d_ff": self.site.width})
            return found["keys"], found["lengths"]
        keys, lengths = self._read(token, texts)
        keep_in_cache(path, lambda working: save_tensors(working, {"keys": keys, "lengths": lengths}, {}))
        return keys, lengths

    @torch.no_grad()
    def _read(self, token: int, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Run the model on the token behind each text; return its keys (n, d_ff) and state norms (n,)."""
        tokenizer, device = self.loaded.tokenizer, self.loaded.device
        rows = [Row(tuple(tokenizer(text)["input_ids"]), (token, token)) for text in texts]
        groups = in_batches(rows, self.batch_size, by_beginning=True)
        parts = (collate([rows[at] for at in indices]).to(device) for indices in groups)
        keys, lengths = [], []
        with quick_products(self.loaded, self.site):
            for part in captured(
                self.loaded.model, self.site, parts, stream=self.loaded.stream, above=False, shared=True
            ):
                column = part.batch.start + 1 - part.first
                keys.append(part.keys[:, column].float().cpu())
                own = state_norms(part)[:, column].cpu()
                lengths.append(own if part.norm is None else torch.zeros_like(own))
        return torch.cat(keys), torch.cat(lengths)


def state_norms(part: Activations) -> Tensor:
    """Return how long the states are that the edited matrix's output is added to: (B, T - first)."""
    lengths: Tensor = torch.linalg.vector_norm(part.hidden.float(), dim=-1)
    return lengths


def mean_direction(keys: Tensor) -> Tensor:
    """Return the mean (d_ff,) of keys (n, d_ff) that are each scaled to length 1."""
    return F.normalize(keys, dim=-1).mean(0)


def _questions() -> list[str]:
    """Return made-up questions whose answer is a number."""
    rng = random.Random(0)
    asked = [
        wording.replace("{}", subject)
        for relation in relations()
        for wording in relation.wordings
        if wording.endswith("?") and any(word in wording for word in _NUMBER)
        for subject in made_up_subjects(relation.kind, 1, rng)
    ]
    return asked[:: max(1, len(asked) // _ASKED)][:_ASKED]
