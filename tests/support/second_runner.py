"""Run by the Python of an environment that has vLLM: what an edited model's state does in its second model runner.

Its arguments are an exported checkpoint, and prompts (numbers of tokens) as JSON, of which the first asks an edit and
the last does not. It prints, as JSON, what becomes of them by vLLM's own classes.
"""

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from memory_alone import served
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState

from wisecli.vllm_plugin.model_state import RoutedState, state_class

CPU = torch.device("cpu")
# What a state of vLLM's reads of its settings.
MODEL = SimpleNamespace(
    get_inputs_embeds_size=lambda: 1,
    dtype=torch.float32,
    max_model_len=64,
    enable_prompt_embeds=False,
    uses_mrope=False,
    uses_xdrope_dim=0,
    multimodal_config=None,
)
SETTINGS = SimpleNamespace(
    model_config=MODEL, scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=64)
)


def parameters(kind, name):
    return list(inspect.signature(getattr(kind, name)).parameters)


def added(memory, count):
    """The places of so many tokens at which the memory adds something."""
    answer = torch.zeros(count, memory.memory.residuals.shape[1])
    width = memory.memory.whitened_keys.shape[1]
    memory.add_to(answer, lambda tokens: (torch.ones(len(tokens), width), True), real=True)
    return answer.any(1).nonzero().flatten().tolist()


def request(name, prompt, generated):
    return NewRequestData(
        req_id=name,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=None,
        pooling_params=None,
        block_ids=([0],),
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=[*prompt, *generated],
    )


def batch_of(prompts):
    """A step of vLLM's with whole prompts."""
    counts = [len(prompt) for prompt in prompts.values()]
    batch = InputBatch.make_dummy(len(prompts), sum(counts), InputBuffers(4, 64, CPU))
    batch.req_ids, batch.num_scheduled_tokens[:] = list(prompts), counts
    batch.input_ids[:] = torch.tensor([token for prompt in prompts.values() for token in prompt])
    batch.positions[:] = torch.cat([torch.arange(count) for count in counts])
    return batch


def main(checkpoint, prompts):
    memory, _ = served(Path(checkpoint))
    state = state_class(DefaultModelState)(SETTINGS, SimpleNamespace(wise_memory=memory), None, CPU)
    own = [name for name in vars(RoutedState) if inspect.isfunction(getattr(RoutedState, name)) and name[0] != "_"]
    told = {"parameters": {name: [parameters(one, name) for one in (ModelState, RoutedState)] for name in own}}
    # The first comes in again after it was preempted, with a token that it has generated.
    whole = {"asks": [*prompts[0], 3], "other": prompts[-1]}
    state.add_request(0, request("asks", prompts[0], [3]))
    state.add_request(1, request("other", prompts[-1], []))
    state.apply_staged_writes()
    told["unanswered"] = [name for name in whole if memory.is_unanswered(name)]
    told["given"] = sorted(state.prepare_inputs(batch_of(whole), None))
    told["added"] = added(memory, sum(map(len, whole.values())))
    state.prepare_dummy_inputs(1, 4)
    told["added to a trial run"] = added(memory, 4)
    state.remove_request("asks")
    state.prepare_inputs(batch_of(whole), None)
    told["added to who has left"] = added(memory, sum(map(len, whole.values())))
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
