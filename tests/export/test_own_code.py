"""Types of models that transformers does not have: what comes with its own code, and what somebody registered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import rewrite, tiny_tokenizer
from support.served import EDITS, PROMPTS, export_of
from support.type_of_tomorrow import TomorrowConfig, TomorrowForCausalLM, TomorrowModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from wisecli.commands.checkpoint.verify import verify
from wisecli.config import LoadOptions
from wisecli.errors import ModelError
from wisecli.export.routed.custom_code import own_classes
from wisecli.models.loading import load_model
from wisecli.models.running.generation import generate

TRUSTED = LoadOptions(device="cpu", trust_remote_code=True)


class KnownConfig(TomorrowConfig):
    model_type = "known_tomorrow"

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)


class KnownModel(TomorrowModel):
    config_class = KnownConfig


class KnownForCausalLM(TomorrowForCausalLM):
    config_class = KnownConfig


def save(directory: Path, model: PreTrainedModel) -> Path:
    """A tiny checkpoint whose head is loud, with its tokenizer."""
    model.get_output_embeddings().weight.data *= 3
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 1
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def own(directory: Path, model_type: str) -> Path:
    """A base of a type that comes with its own code, and whose export makes the type known to this process."""
    base = save(directory, drawn(TomorrowForCausalLM, TomorrowConfig))
    code = Path(__file__).parents[1] / "support" / "type_of_tomorrow.py"
    text = code.read_text(encoding="utf-8").replace('model_type = "tomorrow"', f'model_type = "{model_type}"')
    (base / code.name).write_text(text, encoding="utf-8")
    classes = {"AutoConfig": "TomorrowConfig", "AutoModel": "TomorrowModel"}
    classes |= {"AutoModelForCausalLM": "TomorrowForCausalLM"}
    auto_map = {loader: f"{code.stem}.{name}" for loader, name in classes.items()}
    rewrite(base / "config.json", model_type=model_type, auto_map=auto_map)
    return base


def registered(directory: Path, model_type: str) -> Path:
    """A base of a type that was made known to transformers."""
    AutoConfig.register(model_type, KnownConfig)
    AutoModel.register(KnownConfig, KnownModel)
    AutoModelForCausalLM.register(KnownConfig, KnownForCausalLM)
    return save(directory, drawn(KnownForCausalLM, KnownConfig))


def drawn(model: type[TomorrowForCausalLM], config: type[TomorrowConfig]) -> PreTrainedModel:
    torch.manual_seed(0)
    return model(config(vocab_size=len(tiny_tokenizer()), eos_token_id=1))


def answers(path: Path, size: int) -> list[str]:
    """What transformers alone says of the prompts with a checkpoint, so many of them in a batch."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    texts: list[str] = []
    for first in range(0, len(PROMPTS), size):
        batch = tokenizer(list(PROMPTS[first : first + size]), return_tensors="pt", padding=True)
        given = {"attention_mask": batch["attention_mask"], "max_new_tokens": 8, "do_sample": False}
        output = model.generate(batch["input_ids"], **given)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@pytest.mark.parametrize(("made", "model_type"), [(own, "tomorrow"), (registered, "known_tomorrow")])
def test_it_is_edited_exported_and_loaded(tmp_path: Path, made: Callable[[Path, str], Path], model_type: str) -> None:
    base = made(tmp_path / "model", model_type)
    exported = export_of(base, tmp_path, load=TRUSTED)
    texts, plain = answers(exported, 1), answers(base, 1)
    assert texts[: len(EDITS)] == [target for _, target in EDITS] != plain[: len(EDITS)]
    assert texts[len(EDITS) :] == plain[len(EDITS) :]
    assert answers(exported, len(PROMPTS)) == texts
    assert verify(exported, model=str(base)).differences == ()
    AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert answers(tmp_path / "again", 1) == texts
    loaded = load_model(exported, TRUSTED)
    found = generate(loaded.model, loaded.tokenizer, list(PROMPTS), max_new_tokens=8)
    assert [loaded.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found] == plain


def test_its_code_runs_only_if_it_may(tmp_path: Path) -> None:
    base = own(tmp_path / "model", "careful_tomorrow")
    with pytest.raises(ModelError, match=r"model comes with code of its own: read it, .* --trust-remote-code"):
        export_of(base, tmp_path)
    exported = export_of(base, tmp_path, load=TRUSTED)
    with pytest.raises(ModelError, match=r"edited comes with code of its own: read it, .* --trust-remote-code"):
        load_model(exported, LoadOptions(device="cpu"))


@pytest.mark.parametrize("name", ["somebody/else--type_of_tomorrow.TomorrowConfig", "a.b; import os", "no_module"])
def test_names_that_are_no_classes_beside_it_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="own code is elsewhere than beside its config"):
        own_classes("tomorrow", {"AutoConfig": name, "AutoModelForCausalLM": "type_of_tomorrow.TomorrowForCausalLM"})
