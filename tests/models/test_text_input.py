import json
from pathlib import Path

import pytest
from support.helpers import save_tiny
from support.loading import CPU
from transformers import AutoTokenizer, PretrainedConfig

from wisecli.models import text_input
from wisecli.models.layout.architectures import architectures
from wisecli.models.text_input import load_tokenizer

TEXTS = ("ba be bi", "[END] ba, bon.", "")


def alter(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (content | values).items() if value is not None}))


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody ask transformers what a config means."""
    monkeypatch.setattr(text_input, "base_config", lambda *_, **__: pytest.fail("the config was asked for"))


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_a_tokenizer_is_the_one_that_transformers_takes(tmp_path: Path, architecture: str, named: str | None) -> None:
    save_tiny(tmp_path, architecture)
    alter(tmp_path / "tokenizer_config.json", tokenizer_class=named)
    found, whole = load_tokenizer(tmp_path, CPU), AutoTokenizer.from_pretrained(tmp_path)
    assert type(found.tokenizer) is type(whole)
    assert found.tokenizer.all_special_ids == whole.all_special_ids
    assert [found.tokenizer(text)["input_ids"] for text in TEXTS] == [whole(text)["input_ids"] for text in TEXTS]


def test_of_a_plain_model_the_files_tell_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)
    alter(tmp_path / "config.json", max_position_embeddings=96)
    with monkeypatch.context() as patched:
        unread(patched)
        found = load_tokenizer(tmp_path, CPU)
    config = PretrainedConfig.from_pretrained(tmp_path)
    assert (found.window, found.vocabulary) == (96, config.vocab_size)
    alter(tmp_path / "config.json", max_position_embeddings=None)
    assert load_tokenizer(tmp_path, CPU).window == 2048  # which is a llama's where its config says nothing


@pytest.mark.parametrize("told", [{"auto_map": {}}, {"text_config": {}}, {"model_type": "qwen2"}, {"vocab_size": "64"}])
def test_what_the_files_do_not_tell_by_themselves_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, object]
) -> None:
    save_tiny(tmp_path)
    unread(monkeypatch)
    alter(tmp_path / "config.json", **told)
    with pytest.raises(pytest.fail.Exception, match="asked for"):
        load_tokenizer(tmp_path, CPU)
