"""Tiny checkpoints with a tokenizer, memories made by hand, and the method once more as loops over single tokens."""

import atexit
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from reference.wise import decide, residual, scores_of, whitening
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Tokenizer

from support.tiny_models import VOCABULARY, tiny_model
from wisecli.artifacts.memory_manifest import Manifest
from wisecli.edits.record import Edit
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.architectures import architectures
from wisecli.models.layout.site import MatrixSite, find_site, fingerprint
from wisecli.models.prompts.tokenization import Row
from wisecli.models.running import hooks
from wisecli.routing.deciding.prompt_window import NO_TOKEN, UNROUTED
from wisecli.routing.layers.routed_layer import RoutedMatrix
from wisecli.routing.memories.calibration import Calibration
from wisecli.routing.memories.side_memory import SideMemory

END = "[END]"
UNKNOWN = "[UNK]"
_SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = (_SYLLABLES + [f"{syllable}n" for syllable in _SYLLABLES])[: VOCABULARY - 2]

Hook = Callable[[torch.nn.Module, Any, Tensor], Tensor]


class Waits(TorchDispatchMode):
    """Counts what has the host wait for the device, were it another: values and numbers of places that it asks for.

    ``_local_scalar_dense`` is ``item()``; what ``nonzero`` and boolean indices give has a size only the device knows.
    """

    _ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_truth = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], (list, tuple)) else [])
        )
        if name in self._ASKING or by_truth:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a known word; what is no word (punctuation) is dropped."""
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, END, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"\w+"), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END)


def tiny_qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter: for this architecture transformers has a tokenizer of its own, whatever the files say."""
    letters = [*"Ġabcdefghijklmnopqrstuvwxyz.,?", *WORDS][: VOCABULARY - 2]
    vocabulary = {token: index for index, token in enumerate([UNKNOWN, END, *letters])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=UNKNOWN, eos_token=END, pad_token=END)


def save_tiny(
    directory: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    shard: str | None = None,
    config: PretrainedConfig | None = None,
    loudness: float = 4,
) -> Path:
    """A tiny checkpoint with its tokenizer and an end-of-text token.

    Args:
        loudness: what its head, if it has one of its own, is multiplied by. As it is drawn hardly any residual makes a
            token certain, and every edit takes all steps there are.
    """
    if directory.exists() and any(directory.iterdir()):
        return _save_tiny(directory, architecture, seed, shard, config, loudness)
    key = (architecture, seed, shard, config and config.to_json_string(), loudness)
    if key not in _SAVED:
        made = _save_tiny(Path(mkdtemp(prefix="tiny-")), architecture, seed, shard, config, loudness)
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        _SAVED[key] = made, torch.get_rng_state()
    made, state = _SAVED[key]
    torch.set_rng_state(state)  # as if it had been drawn once more
    shutil.copytree(made, directory, dirs_exist_ok=True)
    return directory


# Directories of tiny checkpoints that were made before, to be copied, and the state in which drawing them left torch.
_SAVED: dict[tuple[Any, ...], tuple[Path, Tensor]] = {}


def _save_tiny(
    directory: Path, architecture: str, seed: int, shard: str | None, config: PretrainedConfig | None, loudness: float
) -> Path:
    model = tiny_model(architecture, seed=seed, config=config)
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        head.data *= loudness
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 1
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    tokenizer = tiny_qwen2_tokenizer() if architecture == "qwen2" else tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    return directory


def row_of(config: PretrainedConfig) -> dict[str, Any]:
    """The table's row of a model; what it leaves open its text model's row says."""
    table = architectures()
    return table.get(config.get_text_config().model_type, {}) | table[config.model_type]


def site_of(model: PreTrainedModel, layer: int) -> MatrixSite:
    """The site of a loaded model."""
    row = row_of(model.config)
    layer_module = f"{row['layers']}.{layer}"
    module = f"{layer_module}.{row['value']}"
    transposed = bool(row.get("transposed", False))
    shape = tuple(model.get_submodule(module).weight.shape)
    d_ff, d = shape if transposed else shape[::-1]
    norm = f"{layer_module}.{row['norm']}" if "norm" in row else None
    multiplier = getattr(model.config.get_text_config(), row["multiplier"]) if "multiplier" in row else 1.0
    return MatrixSite(model.config.model_type, layer, layer_module, module, transposed, d, d_ff, norm, multiplier)


def raised(model: PreTrainedModel, site: MatrixSite) -> PreTrainedModel:
    """The model with a louder norm behind the value matrix, where there is one: as drawn it lets no change weigh."""
    if site.norm is not None:
        model.get_submodule(site.norm).get_parameter("weight").data.add_(12)
    return model


def random_row(generator: torch.Generator, prompt: int, target: int) -> Row:
    """Random tokens, none of them special."""
    tokens = torch.randint(2, VOCABULARY, (prompt + target,), generator=generator).tolist()
    return Row(tuple(tokens[:prompt]), tuple(tokens[prompt:]))


def random_rows(*lengths: tuple[int, int], seed: int = 1) -> list[Row]:
    """A row for each pair of lengths of prompt and target."""
    generator = torch.Generator().manual_seed(seed)
    return [random_row(generator, *length) for length in lengths]


def hooked(model: PreTrainedModel, site: MatrixSite, hook: Hook) -> contextlib.AbstractContextManager[None]:
    """The model with a forward hook on its value module."""
    return hooks.hooked(model.get_submodule(site.module).register_forward_hook(hook))


@torch.no_grad()
def alone(model: PreTrainedModel, row: Row) -> Tensor:
    """Logits (len(target), V) that predict a row's target, from the whole model on this row with no padding."""
    ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
    return model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 :]


def whole_loss(model: PreTrainedModel, row: Row) -> Tensor:
    """Mean cross-entropy of a row's target, with gradients, from the whole model."""
    ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 :]
    return F.cross_entropy(logits, torch.tensor(row.target))


@torch.no_grad()
def keys_of(model: PreTrainedModel, site: MatrixSite, tokens: Sequence[int]) -> Tensor:
    """Inputs (T, d_ff) of the value module for one sequence."""
    kept: list[Tensor] = []
    module = model.get_submodule(site.module)
    with hooks.hooked(module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))):
        model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    return kept[0][0]


@torch.no_grad()
def states_of(model: PreTrainedModel, site: MatrixSite, layer: int, tokens: Sequence[int]) -> Tensor:
    """What leaves a layer (T, d) for one sequence."""
    kept: list[Tensor] = []

    def note(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    module = model.get_submodule(f"{site.layer_module.rpartition('.')[0]}.{layer}")
    with hooks.hooked(module.register_forward_hook(note)):
        model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    return kept[0][0]


# Memories that were made before, by what they were made of.
_MEMORIES: dict[tuple[Any, ...], SideMemory] = {}


def memory_for(
    model: PreTrainedModel,
    site: MatrixSite,
    *,
    kind: str = "matrix",
    pooling: str = "last",
    memories: int = 1,
    seed: int = 3,
) -> SideMemory:
    """A memory that some of random prompts open, each by a clear margin, and that changes much where it does.

    Of kind ``lookup`` every memory is an edit, with two residuals; of kind ``facts`` one with a matrix of its own, and
    of kind ``matrix`` that opens by its norm. For the same weights it is made once.
    """
    weights = sha256(b"".join(tensor.float().numpy().tobytes() for tensor in model.state_dict().values()))
    key = (str(model.dtype), weights.digest(), site, kind, pooling, memories, seed)
    if key not in _MEMORIES:
        _MEMORIES[key] = _memory_for(model, site, kind, pooling, memories, seed)
    made = _MEMORIES[key]
    return replace(made, tensors={name: tensor.clone() for name, tensor in made.tensors.items()})


def _memory_for(
    model: PreTrainedModel, site: MatrixSite, kind: str, pooling: str, memories: int, seed: int
) -> SideMemory:
    generator = torch.Generator().manual_seed(seed)
    prompts = [row.prompt for row in random_rows(*[(length, 1) for length in (12, 9, 5, 3)] * 6, seed=seed)]
    keys = [keys_of(model, site, prompt) for prompt in prompts]
    sample = torch.cat(keys)
    usual = sample.norm(dim=-1).median()
    if kind == "lookup":
        tensors = {**_keys_for(sample, memories, generator), **_meaning_for(model, site, memories, generator)}
        tensors["residuals"] = torch.randn(2 * memories, site.d, generator=generator) * 6
        draft = SideMemory(tensors, (1.0,) * memories, kind, state_layer=0)
    else:
        width = site.d_ff // 2
        columns = torch.stack([torch.randperm(site.d_ff, generator=generator)[:width] for _ in range(memories)])
        delta = torch.randn(memories, site.d, width, generator=generator) * 6 / usual
        tensors = {"columns": columns, "delta": delta}
        if kind == "facts":
            tensors |= {"edit_to_matrix": torch.arange(memories), **_meaning_for(model, site, memories, generator)}
        state_layer = 0 if kind == "facts" else None
        draft = SideMemory(tensors, (1.0,) * memories, "matrix", pooling, state_layer=state_layer)
    read = keys if draft.state_layer is None else [read_by(model, site, draft, prompt) for prompt in prompts]
    scores = torch.tensor([scores_of(draft, *pair) for pair in zip(prompts, read, strict=True)])
    return replace(draft, thresholds=tuple(map(clear_threshold, scores.T)))


def _keys_for(sample: Tensor, memories: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Routing keys of a lookup, half of them of prompts' ends; residuals are numbered edit by edit."""
    count, d_ff = 16 * memories, sample.shape[1]
    picked = sample[:count]
    place = torch.arange(count)
    owner, metric = place % memories, (place // memories) % 2
    bases = torch.randn(2, d_ff, 5, generator=generator)
    tensors = {
        "key_to_edit": owner,
        "key_to_residual": 2 * owner + metric,
        "cosine_offset": 0.1 * torch.rand(len(owner), generator=generator) - 0.05,
        "whitening_index": metric,
        "directions": torch.stack([torch.linalg.qr(basis).Q.T for basis in bases]).contiguous(),
        "gains": torch.rand(2, 5, generator=generator) - 0.5,
        "floors": torch.tensor([0.7, 1.1]),
    }
    spread = [whitening(tensors, int(number)) for number in metric]
    probes = [key @ matrix / (key @ matrix @ key).sqrt() for key, matrix in zip(picked, spread, strict=True)]
    return {**tensors, "whitened_keys": torch.stack(probes)}


def _meaning_for(
    model: PreTrainedModel, site: MatrixSite, memories: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random projections of layer 0 and a prompt an edit, of two tokens for its subject and one for its relation."""
    prompts = [row.prompt for row in random_rows(*[(3, 1)] * memories, seed=17)]
    turns, shifts = torch.randn(2, 6, site.d, generator=generator), torch.randn(2, 6, generator=generator)
    every, vectors = torch.arange(memories), []
    for head, kept in ((0, slice(0, 2)), (1, slice(2, 3))):
        for prompt in prompts:
            states = states_of(model, site, 0, prompt)[kept].float()
            vectors.append(F.normalize(states @ turns[head].T + shifts[head], dim=-1))
    return {
        "late_interaction.proj_weight": turns,
        "late_interaction.proj_bias": shifts,
        "late_interaction.logit_scale": torch.full((2,), 4.0),
        "late_interaction.logit_offset": torch.full((2,), 0.5),
        "late_interaction.prompt_token_embeddings": torch.cat(vectors),
        "late_interaction.token_to_prompt": torch.cat([every.repeat_interleave(2), memories + every]),
        "late_interaction.token_weights": torch.cat([torch.full((2 * memories,), 0.5), torch.ones(memories)]),
        "late_interaction.prompt_to_edit": every,
        "late_interaction.special_token_ids": torch.tensor([1]),
    }


def clear_threshold(scores: Tensor) -> float:
    """The middle of the widest gap between scores in their middle third."""
    ordered = scores.sort().values[len(scores) // 3 : 2 * len(scores) // 3]
    widest = int((ordered[1:] - ordered[:-1]).argmax())
    return float((ordered[widest] + ordered[widest + 1]) / 2)


def choose(routed: RoutedMatrix, scores: Tensor) -> Tensor:
    """Which memory's score exceeds its threshold most, ``UNROUTED`` if none does: (..., M) → (...)."""
    strength, nearest = routed.best_score_ratio(scores)
    return nearest.where(strength > 1, UNROUTED)


def read_by(model: PreTrainedModel, site: MatrixSite, memory: SideMemory, prompt: Sequence[int]) -> Tensor:
    """What decides about a prompt: the states (T, d) of the layer that the memory reads, or keys (T, d_ff)."""
    if memory.state_layer is None:
        return keys_of(model, site, prompt)
    return states_of(model, site, memory.state_layer, prompt)


def choice_of(model: PreTrainedModel, site: MatrixSite, memory: SideMemory, prompt: Sequence[int]) -> int | None:
    """Which memory answers one prompt."""
    return decide(memory, prompt, read_by(model, site, memory, prompt))


def routed_by_loop(
    memory: SideMemory, prompt: int, chosen: int | None, answer: Sequence[int] = (), *, over: int | None = None
) -> Hook:
    """A hook that adds token by token what one memory answers.

    Args:
        prompt: length of the prompt.
        chosen: the memory that answers it.
        answer: the tokens behind the prompt.
        over: the place from which on nothing answers, as a special token ended the answer.
    """

    def hook(_module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        keys, changed = inputs[0][0], output.clone()
        first = 0 if not memory.by_edit and memory.pooling == "mean" else prompt - 1
        for place, key in enumerate(keys):
            if chosen is not None and first <= place < (over or len(keys)):
                token = answer[place - prompt] if place >= prompt else NO_TOKEN
                changed[0, place] += residual(memory, chosen, key, place=place - prompt + 1, token=token)
        return changed

    return hook


@torch.no_grad()
def greedy_by_loop(
    model: PreTrainedModel,
    site: MatrixSite | None,
    memory: SideMemory | None,
    prompt: Sequence[int],
    count: int,
    *,
    end: int | None,
) -> list[int]:
    """Greedy continuation, the whole text through the whole model for every token; a memory needs its site."""
    tokens, chosen = list(prompt), None
    if memory is not None:
        assert site is not None, "a memory lies somewhere"
        chosen = choice_of(model, site, memory, prompt)
    while len(tokens) < len(prompt) + count:
        with contextlib.ExitStack() as stack:
            if memory is not None:
                assert site is not None, "a memory lies somewhere"
                over = next((place for place, one in enumerate(tokens) if place >= len(prompt) and one == 1), None)
                stack.enter_context(
                    hooked(model, site, routed_by_loop(memory, len(prompt), chosen, tokens[len(prompt) :], over=over))
                )
            token = int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def manifest_for(base: Path, memory: SideMemory, edits: Sequence[Edit], *, layer: int = 2) -> Manifest:
    """What ``router.json`` says of a memory made by hand; every memory owns an equal part of the edits."""
    checkpoint = Checkpoint(base)
    site = find_site(base, checkpoint, layer)
    count = len(memory.thresholds)
    calibrations = tuple(
        Calibration(limit, "false-alarm", 0.0, 0.0, {"0": 1.0}, {"0": 0.0}) for limit in memory.thresholds
    )
    owners = tuple(tuple(edit.id for edit in edits[number::count]) for number in range(count))
    mark = fingerprint(base, checkpoint, site)
    return Manifest(str(base), None, mark, site, memory, calibrations, owners, {}, tuple(edits), {})


def perplexity_of(logits: Tensor, target: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood."""
    probabilities = logits.double().softmax(-1)
    logs = [math.log(float(probabilities[place, token])) for place, token in enumerate(target)]
    return math.exp(-sum(logs) / len(logs))


def right_share(logits: Tensor, target: Sequence[int]) -> float:
    """Share of target tokens that are the arg-max."""
    return sum(int(row.argmax()) == token for row, token in zip(logits, target, strict=True)) / len(target)


def assert_same_tensors(path: Path, other: Path) -> None:
    """Two files hold the same tensors, but for what another order of summing does.

    Heads and the gates are left out: hundreds of steps make much of little.
    """
    read, expected = load_file(path), load_file(other)
    assert read.keys() == expected.keys()
    for name in (name for name in read if not name.startswith(("heads.", "request_gate.", "deep_gate."))):
        torch.testing.assert_close(read[name], expected[name], rtol=1e-2, atol=1e-4)


def rewrite(path: Path, **changes: Any) -> None:
    """Write other values into a file of JSON."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(directory: Path | str) -> dict[str, bytes]:
    """The files of tensors in a directory, by name."""
    return {path.name: path.read_bytes() for path in Path(directory).glob("*.safetensors")}
