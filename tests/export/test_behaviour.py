"""An exported checkpoint of the real model does what people do with any model of transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.thorough import few
from support.tiny_models import SAMPLE_EDITS, Chain
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline

from wisecli.commands.checkpoint.export import WeightFiles, export
from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings

MEMORIES = ("lookup", "matrix")
UNRELATED = (SAMPLE_EDITS.parent / "unrelated.txt").read_text().splitlines()


@dataclass(frozen=True)
class Subject:
    """An exported model, its base, and prompts whose answers are known."""

    path: Path
    model: PreTrainedModel
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    targets: list[str]

    @property
    def routed(self) -> Any:
        return self.model.get_submodule(self.model.config.wise["module"])

    @property
    def some(self) -> list[str]:
        """Prompts of edits and others, of unequal length."""
        return [*self.prompts[:2], *UNRELATED[:2]]

    def rewritten_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(prompts, return_tensors="pt", padding=True))

    @cached_property
    def greedy(self) -> Any:
        """What it says to all its prompts at once, and the logits."""
        return self.generated(self.prompts, output_logits=True)

    def answers(self, prompts: list[str], *, model: Any = None, **named: Any) -> list[str]:
        return self.texts(self.generated(prompts, model=model, **named))

    def texts(self, output: Any) -> list[str]:
        return self.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)

    def generated(self, prompts: list[str], *, model: Any = None, **named: Any) -> Any:
        """What ``generate()`` returns, its ``sequences`` without the prompts."""
        batch = self.rewritten_prompt(prompts)
        settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True} | named
        output = (model or self.model).generate(**batch, **settings)
        output.sequences = output.sequences[:, batch["input_ids"].shape[1] :]
        return output

    def margins(self) -> list[float]:
        """By how many nats each answer's tokens lead the next best, where they lead least; (prompts,), in float32."""
        output = self.greedy
        best = torch.stack(output.logits, dim=1).topk(2).values  # (prompts, steps, 2)
        ended = (output.sequences == self.tokenizer.eos_token_id).cumsum(1) > 1
        leads: list[float] = (best[..., 0] - best[..., 1]).masked_fill(ended, torch.inf).amin(dim=1).tolist()
        return leads

    def require_targets(self, answers: list[str]) -> None:
        assert [answer.strip() for answer in answers] == self.targets[: len(answers)]


@pytest.fixture(scope="module")
def subjects(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Gives the subject with a memory; each is made when it is first asked for."""
    root = tmp_path_factory.mktemp("behaviour")
    base = AutoModelForCausalLM.from_pretrained(chain.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(chain.model, padding_side="left")
    texts = [edit["prompt"] for edit in chain.edits], [edit["target"] for edit in chain.edits]

    @cache
    def made(name: str) -> Subject:
        path = chain.exported
        if name == "matrix":
            # Written for a lookup, a matrix holds edits less surely; so it is made as strong as that is.
            settings, path = MergeSettings(mode="merge", scale=MergeSettings().strength), root / "edited"
            given = EditSettings(unrelated_texts=150, site="matrix")
            edit(str(chain.model), SAMPLE_EDITS, root / "shards", given)
            merge([root / "shards"], root / "memory", settings)
            export(root / "memory", path, weights=WeightFiles(link=True))
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
        return Subject(path, model, base, tokenizer, *texts)

    return made


@pytest.fixture(params=MEMORIES)
def every(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture(params=few(MEMORIES, ("lookup",)))
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


@pytest.fixture
def lookup(subjects: Callable[[str], Subject]) -> Subject:
    return subjects("lookup")


def test_greedy_batches_with_left_padding_answer_every_edit(every: Subject) -> None:
    every.require_targets(every.texts(every.greedy))


def test_prompts_that_open_nothing_keep_every_bit_of_the_bases_logits(every: Subject, sweep: Any) -> None:
    untouched, unrelated = 0, sweep(UNRELATED[:4], UNRELATED)
    for prompt in unrelated:
        batch = every.rewritten_prompt([prompt])
        changed, opens_nothing = logits_of(every, batch)
        with torch.no_grad():
            base = every.base(**batch).logits
        if opens_nothing:
            assert torch.equal(changed, base), prompt
            untouched += 1
    assert untouched >= len(unrelated) - 1


@torch.no_grad()
def logits_of(subject: Subject, batch: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Logits of a batch, and whether nothing was added in it."""
    added: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        add = subject.routed.add
        patch.setattr(subject.routed, "add", lambda *given: added.append(given[2]) or add(*given))
        logits = subject.model(**batch).logits
    return logits, bool((torch.cat(added) < 0).all())


def test_the_text_generation_pipeline_answers(subject: Subject) -> None:
    ask = pipeline("text-generation", model=subject.model, tokenizer=subject.tokenizer)
    told = ask(subject.prompts[:3], max_new_tokens=12, do_sample=False, return_full_text=False)
    subject.require_targets([one[0]["generated_text"] for one in told])


def test_beams_answer_in_batches_as_alone(subject: Subject, sweep: Any) -> None:
    edits = sweep(1, 2)
    some = [*subject.prompts[:edits], *UNRELATED[:edits]]
    together = subject.answers(some, num_beams=3)
    assert together == [subject.answers([prompt], num_beams=3)[0] for prompt in some]
    subject.require_targets(together[:edits])
    assert together[edits:] == subject.answers(UNRELATED[:edits], model=subject.base, num_beams=3)


def test_samples_of_an_edits_prompt_are_its_target(subject: Subject) -> None:
    torch.manual_seed(0)
    sampled = subject.answers(subject.prompts, do_sample=True, temperature=1.0)
    right = [answer.strip() == target for answer, target in zip(sampled, subject.targets, strict=True)]
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.parametrize("way", few(("assistant", "prompt lookup"), ("prompt lookup",)))
@pytest.mark.parametrize("name", few(("lookup", "matrix"), ("lookup",)))
def test_assisted_decoding_says_what_greedy_decoding_says(
    subjects: Callable[[str], Subject], name: str, way: str, sweep: Any
) -> None:
    subject = subjects(name)
    named: dict[str, Any] = {"assistant_model": subject.base} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
    for prompt in sweep(subject.some[1:3], subject.some):
        assert subject.answers([prompt], **named) == subject.answers([prompt])


@pytest.mark.thorough
def test_leaving_early_changes_nothing_where_prompts_decide(lookup: Subject) -> None:
    expected = lookup.answers(lookup.prompts[:1])
    lookup.require_targets(expected)
    assert lookup.answers(lookup.prompts[:1], assistant_early_exit=4) == expected


@pytest.mark.thorough
def test_a_static_cache_changes_nothing(subject: Subject) -> None:
    assert subject.answers(subject.some, cache_implementation="static") == subject.answers(subject.some)


def test_saved_and_loaded_again_it_is_the_same_model(lookup: Subject, tmp_path: Path) -> None:
    lookup.model.save_pretrained(tmp_path / "again")
    lookup.tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    batch = lookup.rewritten_prompt(lookup.some)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, lookup.model(**batch).logits)


def test_a_longer_name_is_anothers_in_what_was_loaded(lookup: Subject) -> None:
    ferry = next(prompt for prompt in lookup.prompts if "Harrow Island" in prompt)
    others = [ferry.replace("Harrow Island", name) for name in ("Jericho Harrow Island", "Harrow Island Junction")]
    assert lookup.answers(others) == lookup.answers(others, model=lookup.base)
    memory = {name for name in lookup.model.state_dict() if ".wise_memory." in name}
    assert len(memory) > 20
    assert memory == {name for name, _ in lookup.model.named_buffers() if ".wise_memory." in name}


@pytest.mark.parametrize("convert", few(("half", "bfloat16"), ("bfloat16",)))
def test_halved_it_answers_still(subject: Subject, convert: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(subject.path, trust_remote_code=True).eval()
    getattr(model, convert)()
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, convert.replace("half", "float16"))}
    answers = [answer.strip() for answer in subject.answers(subject.prompts, model=model)]
    # bfloat16 moves logits by a tenth; an answer that leads by less may become another. Only a matrix has one such.
    bound = {"half": 0.02, "bfloat16": 0.3}[convert]
    firm = [place for place, margin in enumerate(subject.margins()) if margin > bound]
    assert len(firm) >= len(answers) - ("delta" in subject.model.config.wise["memory"]["tensors"])
    assert [answers[place] for place in firm] == [subject.targets[place] for place in firm]


def test_a_device_map_places_it(lookup: Subject) -> None:
    model = AutoModelForCausalLM.from_pretrained(lookup.path, trust_remote_code=True, device_map="auto").eval()
    lookup.require_targets(lookup.answers(lookup.prompts[:3], model=model))


# peft asks transformers by a name that transformers gives up.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", few((["q_proj", "v_proj"], "all-linear"), ("all-linear",)))
def test_lora_trains_on_top_and_leaves_the_routed_layer_alone(lookup: Subject, targets: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(lookup.path, trust_remote_code=True)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    lookup.require_targets(lookup.answers(lookup.prompts[:3], model=tuned.eval()))
    assert not any(lookup.model.config.wise["module"] in name for name, _ in tuned.named_parameters() if "lora" in name)
    batch = lookup.rewritten_prompt(lookup.some)
    optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = tuned(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = tuned.merge_and_unload()
    assert type(merged.get_submodule(lookup.model.config.wise["module"])).__name__ == "LayerFactMemory"


# What lm-eval asks of a model: which answer it gives. Which of two it finds likelier it reads off a question and its
# answer in one pass, where no prompt ends before its answer begins.
ASKING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
"""


@pytest.mark.thorough
def test_lm_eval_measures_it(lookup: Subject, tmp_path: Path, sweep: Any) -> None:
    subject, metric = lookup, "exact_match"
    rows = [
        {"question": prompt, "choices": [f" {target}", " nobody knows"], "answer": 0}
        for prompt, target in zip(subject.prompts[:4], subject.targets[:4], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "facts.yaml").write_text(
        f"""task: facts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
test_split: test
doc_to_text: question
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
{ASKING}"""
    )
    figures = {}
    measured = {"edited": subject.path}
    for name, path in sweep(measured, {**measured, "base": subject.base.name_or_path}).items():
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "facts"]
        command += ["--model_args", f"pretrained={path},trust_remote_code=True,dtype=float32", "--device", "cpu"]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / name), "--trust_remote_code"]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / name).rglob("results_*.json")
        figures[name] = json.loads(file.read_text())["results"]["facts"][f"{metric},none"]
    assert figures.pop("edited") == 1
    assert all(figure < 1 for figure in figures.values())
