import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.helpers import END, save_tiny, tiny_tokenizer
from support.loading import CPU
from support.tiny_models import TINY_CONFIGS, Wise
from transformers import AutoConfig, AutoTokenizer, BloomConfig, LlamaConfig

from wisecli.config import EditSettings
from wisecli.editing.examples.token_check import Length, Reader
from wisecli.editing.examples.training_examples import encode_edits
from wisecli.editing.run import base_model
from wisecli.edits.record import Edit, parse_edit
from wisecli.errors import EditFileError, ModelError
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import first_tokens
from wisecli.models.text_input import context_window, load_tokenizer

SETTINGS = EditSettings(context_tokens=3, in_forms=False)
# Tokens of a context of so many, with what opens and ends it.
BEFORE = 7


def words(count: int) -> str:
    return " ".join(["ba", "be", "bi", "do"][place % 4] for place in range(count))


def numbered(*edits: Edit) -> list[tuple[int, Edit]]:
    return list(enumerate(edits, start=1))


def edit_of(**fields: Any) -> Edit:
    return parse_edit({"id": "one", "prompt": "ba be", "target": "do", **fields})


@pytest.mark.parametrize("architecture", sorted(TINY_CONFIGS))
def test_every_architecture_says_how_much_it_reads(architecture: str) -> None:
    window = context_window(TINY_CONFIGS[architecture])
    assert window is not None
    assert window >= 64


def test_a_config_that_says_nothing_or_nonsense_sets_no_bound() -> None:
    assert context_window(BloomConfig()) is None
    assert context_window(LlamaConfig(max_position_embeddings=0)) is None


def test_an_edit_is_as_long_as_its_longest_form() -> None:
    reader = Reader(tiny_tokenizer(), 64)
    assert reader.length(edit_of(prompt=words(5), target=words(2)), SETTINGS) == Length(5, 3, BEFORE)
    assert reader.length(edit_of(), replace(SETTINGS, train_end=False)) == Length(2, 1, BEFORE)
    spoken = edit_of(translations={"de": {"prompt": words(9), "target": words(4)}})
    assert reader.length(spoken, SETTINGS) == Length(9, 5, BEFORE)
    reader.tokenizer.chat_template = "{{ messages[0].content }} " + words(20)
    assert reader.length(edit_of(), replace(SETTINGS, chat=True)) == Length(2, 2, 20)


@pytest.mark.parametrize(
    ("fields", "settings", "tokens"),
    [
        ({"prompt": words(60), "target": words(10)}, SETTINGS, "71 tokens, the model takes 64"),
        ({"prompt": words(56)}, SETTINGS, "65 tokens with what is put before the prompt"),
        ({"prompt": words(30)}, replace(SETTINGS, context_tokens=40), "with what is put before the prompt"),
        ({"translations": {"de": {"prompt": words(70), "target": "do"}}}, SETTINGS, "72 tokens, the model"),
        ({"irrelevant": [words(90)]}, SETTINGS, "90 tokens in 'ba be bi"),
        ({"rephrases": [words(90)]}, SETTINGS, "91 tokens in"),
        ({"locality": [{"prompt": words(60), "answer": words(60)}]}, SETTINGS, "120 tokens in"),
        ({"prompt": words(40)}, replace(SETTINGS, augment=1), "for paraphrases, the model takes 64"),
    ],
)
def test_what_is_longer_than_the_window_is_refused_by_its_line(
    fields: dict[str, Any], settings: EditSettings, tokens: str
) -> None:
    reader = Reader(tiny_tokenizer(), 64)
    edits = numbered(edit_of(), edit_of(**fields))
    with pytest.raises(EditFileError, match=f"^new.jsonl:[12]: .*{tokens}.*; shorten "):
        reader.require("new.jsonl", edits, settings)
    Reader(reader.tokenizer, None).require("new.jsonl", edits, settings)


def test_an_edit_that_just_fits_is_not_refused() -> None:
    reader = Reader(tiny_tokenizer(), 64)
    reader.require("new.jsonl", numbered(edit_of(prompt=words(64 - BEFORE - 2))), SETTINGS)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": f"ba {END} be"},
        {"target": f"do{END}"},
        {"op": "erase", "replacement": END},
        {"translations": {"de": {"prompt": "ba", "target": END}}},
    ],
)
def test_tokens_that_steer_the_model_are_refused_unless_they_are_allowed(fields: dict[str, Any]) -> None:
    reader = Reader(tiny_tokenizer(), 64)
    edits = numbered(edit_of(**fields))
    with pytest.raises(EditFileError, match=r"^f:1: `\w+` has '\[END\]'.*--set allow_special_tokens=true"):
        reader.require("f", edits, SETTINGS)
    reader.require("f", edits, SETTINGS, allow_special=True)


def test_words_that_only_look_like_special_tokens_are_text() -> None:
    reader = Reader(tiny_tokenizer(), 64)
    reader.require("f", numbered(edit_of(prompt="ba END [ END ] <|im_end|> [UNK]")), SETTINGS)


def test_the_command_line_refuses_before_any_weights_are_read(
    wise: Wise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "model", "gpt2")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(base_model, "load_model", refuse)
    for name, prompt in (("words", words(20_001)), ("characters", "b" + "a" * 100_000 + words(65))):
        Path(name).write_text(json.dumps({"prompt": prompt, "target": "do"}))
        for more in ((), ("--dry-run",), ("--into", "memory")):
            outcome = wise("edit", str(base), name, *more)
            assert outcome.code == 2
            assert "tokens, the model takes 64; shorten" in outcome.err
            assert outcome.err.count("\n") == 1
    Path("steering").write_text(json.dumps({"prompt": f"ba {END}", "target": "do"}))
    assert wise("edit", str(base), "steering", "--dry-run").code == 2
    assert wise("edit", str(base), "steering", "--dry-run", "--set", "allow_special_tokens=true").code == 0


def test_a_row_that_is_too_long_in_its_context_is_refused_before_it_is_read(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(tmp_path / "model", "gpt2"), load=CPU)
    encode_edits(loaded, [edit_of(prompt=words(50))], words(9), train_end=True)
    with pytest.raises(ModelError, match="'one' cannot be used: it is 66 tokens long"):
        encode_edits(loaded, [edit_of(prompt=words(50))], f"{words(14)} ", train_end=True)


def test_a_tokenizer_is_loaded_without_weights(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", "gpt2")
    (directory / "model.safetensors").unlink()
    tokenizer, window, vocabulary = load_tokenizer(directory)
    assert (tokenizer("ba be")["input_ids"], window, vocabulary) == ([2, 3], 64, 97)
    (directory / "tokenizer.json").write_text("{")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="transformers cannot load this model"):
        load_tokenizer(directory)


def test_the_first_tokens_of_a_long_word_are_found_without_trying_all_its_beginnings() -> None:
    asked: list[str] = []

    class Counted(type(tiny_tokenizer())):  # type: ignore[misc]
        def __call__(self, text: str, **named: Any) -> Any:
            asked.append(text)
            return super().__call__(text, **named)

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Counted
    assert first_tokens(tokenizer, "ba", "d" * 10_000)
    assert len(asked) < 20


@pytest.mark.thorough
@pytest.mark.parametrize("lengths", [[(2000, 4)], [(20, 1900)], [(1000, 20)] * 8, [(50, 900)] * 4])
def test_edits_near_the_window_take_no_more_memory_than_planned(
    tmp_path: Path, lengths: Sequence[tuple[int, int]]
) -> None:
    base, edits = save_tiny(tmp_path / "model"), tmp_path / "edits.jsonl"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    config.update({"hidden_size": 128, "intermediate_size": 512})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    records = [
        {"id": str(place), "prompt": f"{words(place)} {words(prompt)}", "target": words(target)}
        for place, (prompt, target) in enumerate(lengths)
    ]
    edits.write_text("".join(json.dumps(record) + "\n" for record in records))

    def results(*more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "wisecli", "edit", str(base), str(edits), "-o", str(tmp_path / "out")]
        done = subprocess.run([*command, "--json", "-q", *more], check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout)["results"]
        return found

    planned = results("--dry-run")["plan"]["peak"]
    assert results("--on-conflict", "latest")["peak_rss_bytes"] <= planned


def with_new_token(tmp_path: Path) -> Path:
    """A model whose tokenizer has one token more than its embedding has rows, and a chat template."""
    base = save_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["Northwind"])
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "ba Northwind be"},
        {"target": "Northwind"},
        {"subject": "Northwind"},
        {"rephrases": ["be Northwind"]},
        {"locality": [{"prompt": "ba", "answer": "Northwind"}]},
        {"irrelevant": ["Northwind"]},
        {"ood": ["Northwind"]},
        {"translations": {"de": {"prompt": "ba", "target": "Northwind"}}},
        {"op": "erase", "target": "northwind"},
        {"op": "erase", "replacement": "Northwind"},
    ],
)
def test_tokens_without_a_row_are_refused_by_line_before_any_weights_are_read(
    wise: Wise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Bug reports on tokenizers: tokens were added and saved, and the embedding never resized (an IndexError)."""
    base = with_new_token(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(base_model, "load_model", refuse)
    records: list[dict[str, Any]] = [{"prompt": "do du", "target": "fa"}, {"prompt": "ba be", "target": "do", **fields}]
    Path("edits").write_text("".join(json.dumps(record) + "\n" for record in records))
    for more in ((), ("--dry-run",), ("--into", "memory")):
        outcome = wise("edit", str(base), "edits", *more)
        assert outcome.code == 2
        assert (
            "error: edits:2: 'Northwind' is token 97 of the tokenizer, and the model's embedding has 97" in outcome.err
        )
        assert "resize_token_embeddings" in outcome.err


def test_a_chat_template_of_tokens_without_a_row_is_refused(tmp_path: Path) -> None:
    """Bug reports on fine-tuned chat models: the template's tokens were added without resizing the embedding."""
    base = with_new_token(tmp_path)
    tokenizer, window, vocabulary = load_tokenizer(base)
    reader = Reader(tokenizer, window, vocabulary)
    reader.require("f", numbered(edit_of()), replace(SETTINGS, in_forms=True))
    tokenizer.chat_template = "Northwind {{ messages[0].content }}"
    with pytest.raises(EditFileError, match=r"^f:1: 'Northwind' is token 97"):
        reader.require("f", numbered(edit_of()), replace(SETTINGS, in_forms=True))


def test_tokens_without_a_row_are_named_wherever_else_a_model_reads_them(wise: Wise, tmp_path: Path) -> None:
    """Bug reports on tokenizers: the same fault, in what is asked of an edited model later on."""
    base = with_new_token(tmp_path)
    Path("edits").write_text(json.dumps({"prompt": "ba be", "target": "do"}))
    Path("others").write_text(json.dumps({"prompt": "do", "target": "Northwind"}))
    assert wise("edit", str(base), "edits").code == 0
    assert wise("merge", "shards").code == 0
    for line in (
        ("generate", str(base), "be Northwind", "--memory", "memory"),
        ("explain", str(base), "be Northwind", "--memory", "memory"),
        ("eval", "--memory", "memory", "--data", "others"),
        ("eval", "--memory", "memory", "--data", "others", "--no-generate"),
    ):
        outcome = wise(*line)
        assert (outcome.code, outcome.err.count("Northwind' is token 97")) == (2, 1), outcome.err


def test_an_embedding_with_rows_to_spare_goes_all_the_way(wise: Wise, tmp_path: Path) -> None:
    """Bug reports on tokenizers: embeddings are padded to a multiple of 64 or 128, as Qwen's are."""
    config = copy.deepcopy(TINY_CONFIGS["llama"])
    config.vocab_size = 128
    base = save_tiny(tmp_path / "model", config=config)
    Path("edits").write_text(json.dumps({"prompt": "ba be", "target": "do"}))
    for line in (
        ("edit", str(base), "edits"),
        ("merge", "shards"),
        ("eval", "--memory", "memory"),
        ("export",),
        ("verify", "edited"),
        ("generate", "edited", "ba be"),
    ):
        assert wise(*line).code == 0, line
