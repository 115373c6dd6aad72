"""WISE as plain loops over prompts, tokens, keys and matrix entries: what the package's code is compared with.

A side memory (arXiv 2405.14768) is decided once a prompt and answers the tokens from the prompt's end on:

    decide      which memory answers a prompt, if any
                by the norm ‖Δ_m a‖ against ε_m (sections 2.3.1 and 2.3.2), or
                by late interaction of its tokens with those of edits' prompts (MaxSim, arXiv 2004.12832)
    residual    what that memory adds at a token: Δ_m a, or the residual of the nearest of an edit's keys
    ties        how the changes of several shards are joined (arXiv 2306.01708)

A key ``a`` (d_ff,) is the input of the edited matrix at a token, a state (d,) what leaves the layer that decides. What
the tensors of a memory hold says :class:`~wisecli.routing.memories.side_memory.SideMemory`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wisecli.routing.deciding.prompt_window import NO_TOKEN
from wisecli.routing.memories.side_memory import SideMemory

# The words of a chat's turn at the least; the last tokens of a prompt that are compared; the share of a subject's words
# that a prompt must hold; how near a key inside an answer must come, and one at the end of a prompt that begins it; and
# which whitening is that of such keys.
_TURN, _COMPARED, _NAMED, _NEAR, _BEGUN, _IN_ANSWER = 4, 1024, 0.75, 0.3, 0.8, 1


# --- which memory answers a prompt ---


def decide(memory: SideMemory, ids: Sequence[int], read: Tensor) -> int | None:
    """Return the memory that answers a prompt, or ``None``.

    Args:
        ids: the prompt's tokens.
        read: its states (T, d) where late interaction decides, else its keys (T, d_ff).
    """
    scores = scores_of(memory, ids, read)
    limits = enumerate(zip(scores, memory.thresholds, strict=True))
    beyond = [number for number, (score, threshold) in limits if score > threshold]
    return max(beyond, key=scores.__getitem__, default=None)


def scores_of(memory: SideMemory, ids: Sequence[int], read: Tensor) -> list[float]:
    """Return how strongly a prompt calls each memory: by the norm of its change, or the probability of its edit."""
    if not memory.by_edit:
        norms = [[float(change(memory, m, key).norm()) for key in read] for m in range(len(memory.thresholds))]
        return [sum(own) / len(own) if memory.pooling == "mean" else own[-1] for own in norms]
    special = memory.tensors["late_interaction.special_token_ids"].tolist()
    probs = edit_probs(memory.tensors, read[compared_tokens(ids, special)].float(), len(memory.thresholds))
    named = names_subjects(memory.tensors, ids, len(memory.thresholds))
    return [prob if name else 0.0 for prob, name in zip(probs, named, strict=True)]


def compared_tokens(ids: Sequence[int], special: Sequence[int]) -> list[int]:
    """Return the places of a prompt's tokens that are compared: the words of its last turn.

    A word is no special token and not the first token, on which attention rests; a prompt without words is compared
    whole, and so are all words where no turn is long enough.
    """
    turns: list[list[int]] = [[]]
    for place, token in enumerate(ids):
        if token in special:
            turns.append([])
        elif place > 0:
            turns[-1].append(place)
    long = [turn for turn in turns if len(turn) >= _TURN]
    words = long[-1] if long else [place for turn in turns for place in turn]
    return (words or list(range(len(ids))))[-_COMPARED:]


def edit_probs(tensors: Mapping[str, Tensor], states: Tensor, edits: int) -> list[float]:
    """Return how likely the tokens with these states (n, d) mean each edit: as the likeliest of its prompts says."""
    own = {name.removeprefix("late_interaction."): tensor for name, tensor in tensors.items()}
    count, probs = len(own["prompt_to_edit"]), [0.0] * edits
    for prompt, edit in enumerate(own["prompt_to_edit"].tolist()):
        both = _found(own, 0, prompt, states) * _found(own, 1, prompt + count, states)
        probs[edit] = max(probs[edit], both)
    return probs


def _found(own: Mapping[str, Tensor], head: int, prompt: int, states: Tensor) -> float:
    """How likely the subject (head 0) or the relation (1) of a kept prompt is found among states (n, d).

    Every token of the prompt looks for the state that is most like it under the head's projection.
    """
    projected = [own["proj_weight"][head].float() @ state + own["proj_bias"][head].float() for state in states]
    score = 0.0
    for token, owner in enumerate(own["token_to_prompt"].tolist()):
        if owner == prompt:
            wanted = own["prompt_token_embeddings"][token].float()
            best = max(float(F.cosine_similarity(wanted, one, dim=0)) for one in projected)
            score += float(own["token_weights"][token]) * best
    return 1 / (1 + math.exp(-float(own["logit_scale"][head]) * (score - float(own["logit_offset"][head]))))


def names_subjects(tensors: Mapping[str, Tensor], ids: Sequence[int], edits: int) -> list[bool]:
    """Return whether a prompt holds most words of one of each edit's names, near each other; without a name it does."""
    own = {name.removeprefix("subject_match."): one.tolist() for name, one in tensors.items()}
    if "token_ids" not in own:
        return [True] * edits
    spelt = dict(zip(own["token_ids"], own["token_to_word"], strict=True))
    entries = list(zip(own["entry_to_name"], own["entry_to_word"], own["word_weights"], strict=True))
    named = [edit not in own["name_to_edit"] for edit in range(edits)]
    for name, edit in enumerate(own["name_to_edit"]):
        weights = {word: weight for number, word, weight in entries if number == name}
        for first in range(len(ids)):
            near = {spelt.get(token) for token in ids[first : first + 2 * len(weights) + 4]}
            share = sum(weight for word, weight in weights.items() if word in near)
            named[edit] = named[edit] or share > _NAMED - 1e-4
    return named


# --- what a memory adds ---


def residual(memory: SideMemory, number: int, key: Tensor, *, place: int = 0, token: int = NO_TOKEN) -> Tensor:
    """Return what an opened memory adds at a key (d_ff,): (d,).

    Args:
        place: how far behind the prompt's last token the key comes; there an edit's answer may be over.
        token: the one that the key was read at.
    """
    if memory.kind == "matrix":
        return change(memory, number, key)
    nearest = nearest_key(memory, number, key, place=place, token=token)
    residuals = memory.tensors["residuals"]
    return torch.zeros_like(residuals[0]) if nearest is None else residuals[memory.tensors["key_to_residual"][nearest]]


def change(memory: SideMemory, number: int, key: Tensor) -> Tensor:
    """Return ``Δ_m a`` (d,) of the matrix that holds memory m."""
    held = memory.tensors["edit_to_matrix"][number] if memory.by_edit else number
    return memory.tensors["delta"][held] @ key[memory.tensors["columns"][held]]


def nearest_key(memory: SideMemory, edit: int, key: Tensor, *, place: int, token: int = NO_TOKEN) -> int | None:
    """Return the nearest of an edit's keys for such a token; ``None`` if in an answer none is near."""
    tensors, found = memory.tensors, cosines(memory.tensors, key)
    own = [number for number, owner in enumerate(tensors["key_to_edit"].tolist()) if owner == edit]
    inside = {number: int(tensors["whitening_index"][number]) == _IN_ANSWER for number in own}
    if place > 0 and "key_to_token" in tensors:  # an answer that has this token here goes on
        read_at = {
            number: (int(tensors["key_to_token"][number]), int(tensors["key_to_place"][number])) for number in own
        }
        same = [number for number in own if read_at[number] == (token, place)]
        if same:
            return max(same, key=found.__getitem__)
    # A prompt's last token may be inside an answer that the prompt begins.
    may_be = [number for number in own if inside[number] == (place > 0) or (inside[number] and found[number] > _BEGUN)]
    best = max(may_be, key=found.__getitem__)
    return None if place > 0 and found[best] <= _NEAR else best


def cosines(tensors: Mapping[str, Tensor], key: Tensor) -> list[float]:
    """Return the whitened cosine of a key ``a`` with every key ``e`` of a lookup: aᵀP e / √(aᵀP a · eᵀP e)."""
    norms = [float(key @ whitening(tensors, number) @ key) ** 0.5 for number in range(len(tensors["floors"]))]
    kept = zip(whitened_keys(tensors), tensors["whitening_index"], tensors["cosine_offset"], strict=True)
    return [float(whitened @ key) / norms[int(number)] + float(offset) for whitened, number, offset in kept]


def whitened_keys(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the keys ``P e / √(eᵀP e)`` of a lookup (n, d_ff), be they stored in bytes or as they are."""
    stored = tensors["whitened_keys"].float()
    return stored * tensors["key_scales"][:, None] if "key_scales" in tensors else stored


def whitening(tensors: Mapping[str, Tensor], number: int) -> Tensor:
    """Return one of the matrices ``P`` (d_ff, d_ff) that keys are whitened by."""
    directions, gains = tensors["directions"][number], tensors["gains"][number]
    even = tensors["floors"][number] * torch.eye(directions.shape[1])
    return even + directions.T @ torch.diag(gains) @ directions


# --- how shards are joined ---


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return the changes (d, d_ff) of several shards as one: trim each, elect a sign an entry, merge what has it."""
    trimmed = [trim(delta, density) for delta in deltas]
    return disjoint_merge(trimmed, weights, elect_sign(trimmed))


def trim(delta: Tensor, density: float) -> Tensor:
    """Return a change with all but a share of its entries set to zero: the largest are kept."""
    entries = delta.flatten().tolist()
    kept = sorted(range(len(entries)), key=lambda place: -abs(entries[place]))[: int(density * len(entries))]
    return torch.tensor([entry if place in kept else 0.0 for place, entry in enumerate(entries)]).view_as(delta)


def elect_sign(deltas: Sequence[Tensor]) -> Tensor:
    """Return the sign, 1 or -1, that each entry has in the sum of the changes; 1 where that is zero."""
    return torch.where(sum(deltas, torch.zeros_like(deltas[0])) >= 0, 1.0, -1.0)


def disjoint_merge(deltas: Sequence[Tensor], weights: Sequence[float], signs: Tensor) -> Tensor:
    """Return the mean of those weighted entries whose sign was elected."""
    merged = torch.zeros_like(signs)
    for row in range(signs.shape[0]):
        for column in range(signs.shape[1]):
            entries = [(float(delta[row, column]), weight) for delta, weight in zip(deltas, weights, strict=True)]
            agreeing = [entry * weight for entry, weight in entries if entry * float(signs[row, column]) > 0]
            merged[row, column] = sum(agreeing) / max(1, len(agreeing))
    return merged


def dense(indices: Sequence[int], values: Tensor, shape: tuple[int, int], *, columns: bool) -> Tensor:
    """Return the change (d, d_ff) of a shard from what its mask keeps: whole columns, or entries numbered by rows."""
    whole = torch.zeros(shape)
    for place, index in enumerate(indices):
        where = (slice(None), index) if columns else divmod(index, shape[1])
        whole[where] = values[..., place]
    return whole
