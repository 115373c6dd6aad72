"""What prompts mean, learned from made-up facts, kept in shards, merged, taken out, exported."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import save_tiny
from support.loading import CPU
from support.tiny_models import tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from wisecli.artifacts.background_stats import RouterHeads
from wisecli.artifacts.memory_manifest import read_memory, write_memory
from wisecli.artifacts.shard import GATE_FORM, PromptStates
from wisecli.artifacts.shard_manifest import read_shard_directory
from wisecli.data.corpus import made_up_subjects, relations
from wisecli.editing.router_training.router_heads import router_heads
from wisecli.editing.router_training.token_states import read_sites, token_states
from wisecli.errors import DamagedFileError, SettingsError
from wisecli.evaluation.edited_model import attach
from wisecli.io.checkpoint import Checkpoint, load_tensors, save_tensors
from wisecli.io.digest import sha256_file
from wisecli.memory.fitting.late_interaction_fitting import fit_late_interaction
from wisecli.memory.fitting.request_gate_fitting import request_gate_tensors
from wisecli.memory.merging.merged_evidence import read_merged_evidence
from wisecli.memory.merging.removal import without
from wisecli.models.base_identity import BaseIdentity
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.models.prompts.prompt_forms import forms
from wisecli.models.prompts.tokenization import Row, collate
from wisecli.progress import ignore_progress
from wisecli.routing.deciding.prompt_words import WORD_CHARS
from wisecli.routing.gating.request_gate import DEEP_GATE, DEEP_LOGIT_OFFSET, LOGIT_OFFSET

EDITS = [
    {"id": "one", "prompt": "ba ka ti mo", "target": "lu", "subject": "ka ti"},
    {"id": "two", "prompt": "no re sa", "target": "be"},
    {"id": "three", "prompt": "fi go hu ja", "target": "ki", "subject": "hu"},
]


def test_packaged_relations_have_one_slot_a_wording_and_subjects_of_their_kind() -> None:
    known = relations()
    wordings = [wording for relation in known for wording in relation.wordings]
    assert all(wording.count("{}") == 1 for wording in wordings)
    assert len({(relation.kind, wording) for relation in known for wording in relation.wordings}) == len(wordings)
    for kind in {relation.kind for relation in known}:
        names = made_up_subjects(kind, 12, random.Random(0))
        assert len(set(names)) == 12
        assert all(name.strip() for name in names)
    assert made_up_subjects("ship", 8, random.Random(1)) == made_up_subjects("ship", 8, random.Random(1))


def test_numbers_of_a_like_name_are_drawn_anew() -> None:
    names = made_up_subjects("star", 40, random.Random(2))
    shapes = ["".join("0" if letter.isdecimal() else letter for letter in name) for name in names]
    assert any(first == second for first, second in zip(shapes[::2], shapes[1::2], strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model", "llama")


def learn(model: Path, identity: str) -> RouterHeads:
    loaded = load_model(model, load=CPU)
    sites = read_sites(loaded, find_site(model, Checkpoint(model), 2))
    known = BaseIdentity(identity, identity)
    return router_heads(loaded, sites, known, texts=24, batch_size=16, on_progress=ignore_progress)


def test_learning_is_the_same_each_time_and_then_cached(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    first, second = learn(model, "one"), learn(model, "two")
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])
    monkeypatch.setattr("wisecli.editing.router_training.router_heads.train_heads", None)
    cached = learn(model, "one")
    assert torch.equal(cached.proj_weight, first.proj_weight)


def test_states_are_those_of_the_whole_model(model: Path) -> None:
    loaded = load_model(model, load=CPU)
    site = find_site(model, Checkpoint(model), 2).below(1)
    texts = ["ba ka ti mo lu", "no re sa", "fi go hu ja ki be ba"]
    read = token_states(loaded, site, texts, batch_size=2, on_progress=ignore_progress, stage="")
    for number, text in enumerate(texts):
        ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
        hidden = loaded.model(ids, output_hidden_states=True).hidden_states[2][0]
        own = read.text == number
        assert torch.allclose(read.states[own].float(), hidden[read.position[own]], atol=2e-3, rtol=1e-2)


# --- the chain ---


def test_learning_is_once_a_model_whichever_layer_above_those_read_is_edited(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    edits, cache = tmp_path / "edits.jsonl", tmp_path / "wise" / "meaning"
    edits.write_text(json.dumps(EDITS[0]) + "\n")
    config = tiny_model("llama").config
    config.num_hidden_layers = 9
    plain, changed = (save_tiny(tmp_path / name, "llama", config=config) for name in ("plain", "changed"))
    tensors = load_tensors(changed / "model.safetensors")
    save_tensors(changed / "model.safetensors", {name: tensor + 0.001 for name, tensor in tensors.items()}, {})
    for base, layer, learnt in ((plain, 6, 1), (plain, 7, 1), (changed, 6, 2), (plain, 4, 3)):
        line = ("edit", base, edits, "-o", tmp_path / f"{base.name}-{layer}", "--layer", layer)
        assert run(*map(str, line), "--device", "cpu") == 0
        assert len(list(cache.iterdir())) == learnt


@pytest.fixture
def shards(model: Path, tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    line = ("edit", model, "edits.jsonl", "--layer", "2", "--device", "cpu")
    assert run(*map(str, line)) == 0
    return tmp_path / "shards"


def test_shards_keep_what_prompts_mean_and_memories_open_by_it(
    shards: Path, tmp_path: Path, run: Callable[..., int]
) -> None:
    directory = read_shard_directory(shards)
    material, (shard,) = read_merged_evidence([directory])
    assert shard.prompts is not None
    assert material.unrelated.heads is not None
    assert shard.prompts.edit.unique().tolist() == [0, 1, 2]
    # Of "ba ka ti mo", whose first token says nothing, two tokens are the subject's.
    bare = (shard.prompts.edit == 0) & (shard.prompts.form == 0)
    assert shard.prompts.subject[bare].tolist() == [True, True, False]
    assert run("merge", "shards") == 0
    memory = read_memory(tmp_path / "memory").memory
    assert (memory.kind, memory.by_edit) == ("lookup", True)
    # Of the first edit's subject: the tokenizer does not know the third's.
    assert material.unrelated.token_characters is not None
    assert torch.equal(memory.tensors["fuzzy_match.token_characters"], material.unrelated.token_characters)
    assert memory.tensors["fuzzy_match.entry_to_edit"].tolist() == [0, 0]
    assert memory.tensors["fuzzy_match.subject_words"].shape == (2, WORD_CHARS)
    assert run("verify", "shards") == run("verify", "memory") == 0
    assert run("export") == run("verify", "edited") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    for edit in EDITS:
        for name in ("bare", "question", "led in"):
            ids = torch.tensor([tokenizer(forms()[name].render(tokenizer, edit["prompt"]))["input_ids"]])
            said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
            if name == "bare":
                assert tokenizer.decode(said[0, -1:]).strip() == edit["target"]


def test_letters_go_with_their_edits_and_where_names_have_no_say(
    shards: Path, tmp_path: Path, run: Callable[..., int]
) -> None:
    def kept(place: str) -> list[int]:
        tensors = read_memory(tmp_path / place).memory.tensors
        assert ("fuzzy_match.token_characters" in tensors) == ("fuzzy_match.entry_to_edit" in tensors)
        return tensors["fuzzy_match.entry_to_edit"].tolist() if "fuzzy_match.entry_to_edit" in tensors else []

    assert run("merge", "shards", "-o", "any", "--subjects", "any") == run("verify", "any") == 0
    assert kept("any") == []
    assert run("merge", "shards") == run("remove", "memory", "two") == run("verify", "memory") == 0
    assert kept("memory") == [0, 0]
    assert run("remove", "memory", "one") == run("verify", "memory") == 0
    assert kept("memory") == []
    assert run("rollback", "memory", "--to", "1") == run("verify", "memory") == 0
    assert kept("memory") == [0, 0]


def test_shards_that_do_not_know_letters_are_merged_as_they_were(
    shards: Path, tmp_path: Path, run: Callable[..., int]
) -> None:
    content = json.loads((shards / "shards.json").read_text())
    del content["subject_tokens"]
    statistics = shards / content["unrelated"]["file"]
    kept = {name: tensor for name, tensor in load_tensors(statistics).items() if name != "token_characters"}
    save_tensors(statistics, kept)
    content["unrelated"]["sha256"] = sha256_file(statistics)
    (shards / "shards.json").write_text(json.dumps(content))
    assert run("merge", "shards") == run("verify", "shards") == run("verify", "memory") == 0
    tensors = read_memory(tmp_path / "memory").memory.tensors
    assert not {name for name in tensors if name.startswith("fuzzy_match.")}
    assert "subject_match.token_ids" in tensors


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("fuzzy_match.entry_to_edit", lambda tensor: tensor + 3),
        ("fuzzy_match.entry_to_word", lambda tensor: tensor - 1),
        ("fuzzy_match.entry_to_word", lambda tensor: tensor[:-1]),
        ("fuzzy_match.subject_words", lambda tensor: tensor.int()),
        ("fuzzy_match.subject_words", lambda tensor: tensor.repeat(1, 2)),
        ("fuzzy_match.token_characters", lambda tensor: tensor[:0]),
        ("fuzzy_match.token_characters", None),
    ],
)
def test_letters_that_cannot_be_right_are_refused(
    shards: Path,
    tmp_path: Path,
    run: Callable[..., int],
    tensor: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    assert run("merge", "shards", "-o", "memory", "--no-history") == 0
    manifest = read_memory(tmp_path / "memory")
    tensors = dict(manifest.memory.tensors)
    if change is None:
        del tensors[tensor]
    else:
        tensors[tensor] = change(tensors[tensor])
    write_memory(tmp_path / "memory", replace(manifest, memory=replace(manifest.memory, tensors=tensors)))
    with pytest.raises(DamagedFileError):
        read_memory(tmp_path / "memory")


def test_an_edit_that_is_taken_out_means_nothing_any_more(shards: Path) -> None:
    whole, _ = read_merged_evidence([read_shard_directory(shards)])
    kept, _ = read_merged_evidence([without(read_shard_directory(shards), {"two"}).directory])
    assert kept.prompts is not None
    assert whole.prompts is not None
    assert kept.prompts.edit.unique().tolist() == [0, 1]
    assert torch.equal(kept.prompts.states, whole.prompts.states[whole.prompts.edit != 1])


def heads_and_prompts(shards: Path) -> tuple[RouterHeads, PromptStates]:
    """What shards keep of the router, and of their edits' prompts."""
    material, _ = read_merged_evidence([read_shard_directory(shards)])
    heads, prompts = material.unrelated.heads, material.prompts
    assert heads is not None
    assert prompts is not None
    return heads, prompts


def test_the_order_of_prompts_changes_nothing(shards: Path) -> None:
    heads, prompts = heads_and_prompts(shards)
    prompts = prompts.compared
    backwards = prompts.rows(prompts.edit.argsort(descending=True, stable=True))
    assert not torch.equal(backwards.edit, prompts.edit)
    found, expected = (fit_late_interaction(heads, one, 3) for one in (backwards, prompts))
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    assert torch.equal(found.own_probs, expected.own_probs)
    assert torch.equal(found.other_probs, expected.other_probs)


def test_other_edits_prompts_raise_an_edits_threshold(shards: Path) -> None:
    heads, prompts = heads_and_prompts(shards)
    prompts = prompts.compared
    loose = fit_late_interaction(replace(heads, logit_offset=torch.full((2,), -1.0)), prompts, 3)
    assert min(loose.thresholds(torch.full((3,), 0.5))) == pytest.approx(0.95)
    strict = fit_late_interaction(
        replace(heads, logit_offset=torch.full((2,), 0.99), logit_scale=torch.full((2,), 1e4)), prompts, 3
    )
    assert strict.thresholds(torch.full((3,), 0.5)) == (0.5,) * 3
    vectors = strict.tensors["late_interaction.prompt_token_embeddings"].float()
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=2e-3)
    # Of edits with a subject its tokens are looked for as such, and the others as the relation's; of others, all twice.
    known = torch.tensor(["subject" in EDITS[edit] for edit in prompts.edit.tolist()])
    for head, own in enumerate((prompts.subject | ~known, ~prompts.subject | ~known)):
        turned = F.normalize(F.linear(prompts.states[own], heads.proj_weight[head], heads.proj_bias[head]), dim=-1)
        kept = (
            strict.tensors["late_interaction.token_to_prompt"] >= len(strict.tensors["late_interaction.prompt_to_edit"])
        ) == bool(head)
        assert torch.allclose(vectors[kept], turned, atol=2e-3)


def test_an_edit_whose_own_prompt_is_unsure_has_a_lower_bar(shards: Path) -> None:
    heads, prompts = heads_and_prompts(shards)
    fitted = fit_late_interaction(heads, prompts.compared, 3)
    # Odds of the gate that are far below nought, so that no offset ends there.
    out = heads.request_gate["request_gate.out"].clone()
    out[0, -1] -= 20
    heads = replace(heads, request_gate={**heads.request_gate, "request_gate.out": out})
    sure, unsure = (
        request_gate_tensors(heads, prompts, replace(fitted, own_probs=torch.full_like(fitted.own_probs, prob)))
        for prob in (0.9, 0.2)
    )
    lower = sure[LOGIT_OFFSET] - unsure[LOGIT_OFFSET]
    assert float(sure[LOGIT_OFFSET].max()) < 0
    # By twice what the log-odds of .2 lack to .5.
    assert torch.allclose(lower, torch.full((3,), 2 * (math.log(4) + 0.5)), atol=1e-4)


def test_without_states_of_the_deep_gates_layer_a_memory_has_the_first_gate_alone(shards: Path) -> None:
    heads, prompts = heads_and_prompts(shards)
    fitted = fit_late_interaction(heads, prompts.compared, 3)
    both = request_gate_tensors(heads, prompts, fitted)
    former = request_gate_tensors(heads, prompts.rows(prompts.form < GATE_FORM), fitted)
    assert both.keys() - former.keys() == {*DEEP_GATE, DEEP_LOGIT_OFFSET}
    assert all(torch.equal(tensor, both[name]) for name, tensor in former.items())


def test_shards_without_meaning_say_what_to_do(model: Path, run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "edits.jsonl").write_text('{"prompt": "ba ka ti", "target": "lu"}\n')
    line = (
        "edit",
        model,
        tmp_path / "edits.jsonl",
        "--layer",
        "2",
        "--device",
        "cpu",
        "-o",
        tmp_path / "plain",
        "--writer",
        "gradient",
        "--passes",
        "1",
    )
    assert run(*map(str, line)) == 0
    assert run("merge", str(tmp_path / "plain"), "--mode", "lookup", "-o", str(tmp_path / "m")) == 2
    assert not (tmp_path / "m").exists()


def test_the_first_layer_has_none_below(model: Path) -> None:
    loaded = load_model(model, load=CPU)
    with pytest.raises(SettingsError, match="a layer below the edited one"):
        read_sites(loaded, find_site(model, Checkpoint(model), 0))


def test_prompts_in_other_languages_open_their_edit_and_need_not_name_its_subject(
    model: Path, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    foreign = {"de": {"prompt": "zo vu pe", "target": "fa"}}
    edits = [{**EDITS[0], "translations": foreign}, {**EDITS[1], "subject": "no re"}, EDITS[2]]
    Path("edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    assert run("edit", str(model), "edits.jsonl", "--layer", "2", "--device", "cpu") == run("merge", "shards") == 0
    material, (shard,) = read_merged_evidence([read_shard_directory(Path("shards"))])
    assert shard.prompts is not None
    own = shard.prompts.compared
    assert own.form[own.edit == 0].unique().tolist() == [0, 1, 2, 4]
    assert own.form[own.edit == 1].unique().tolist() == [0, 1, 2]
    # The subjects of two are known, and the second's alone is asked for.
    assert [bool(words) for words in material.subjects] == [True, True, False]
    edited = attach(Path("memory"), load=CPU)
    for prompt, named in (("zo vu pe", [True, False, True]), (EDITS[1]["prompt"], [True, True, True])):
        ids = tuple(edited.tokenizer(prompt)["input_ids"])
        known = edited.decide(collate([Row(ids, ids[:1])]))
        assert known is not None
        assert known.subject_matched is not None
        assert known.subject_matched[0].tolist() == named
        assert int(known.scores[0].argmax()) == (0 if prompt == "zo vu pe" else 1)


def test_an_edits_own_prompt_opens_it_however_little_was_learned(
    model: Path, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bar is measured with the prompt's first word, as the prompt is decided."""
    monkeypatch.chdir(tmp_path)
    Path("edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    monkeypatch.setenv("WISE_UNRELATED_TEXTS", "20")
    assert run("edit", str(model), "edits.jsonl", "--layer", "2", "--device", "cpu") == run("merge", "shards") == 0
    (shard,) = read_merged_evidence([read_shard_directory(Path("shards"))])[1]
    assert shard.prompts is not None
    assert {edit for edit, form in shard.prompts.openings() if form == 0} == {0, 1, 2}
    edited = attach(Path("memory"), load=CPU)
    for number, edit in enumerate(EDITS):
        ids = tuple(edited.tokenizer(edit["prompt"])["input_ids"])
        decision = edited.decide(collate([Row(ids, ids[:1])]))
        assert decision is not None
        assert decision.memory.tolist() == [number]
