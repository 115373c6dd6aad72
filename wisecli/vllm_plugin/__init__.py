"""Edited checkpoints in vLLM's own model classes (extra ``vllm``): ``vllm serve edited``.

    engine_names   what vLLM knows parts of an edited model by
    registration   tells vLLM of edited model types and architectures, and with which worker and scheduler they run
    models         a subclass of vLLM's class of the base's architecture, which reads the side memory, too
    residual_hooks the one place where something is added to what vLLM's layers compute
    served_memory  decides what answers prompts, and adds residuals
    windows        runs windows of prompts through the first layers, for a decision
    requests       which memory answers each request, and so each token of a step
    processes      what the processes of a model tell each other
    workers        the processes that hold the model, each with such a runner
    runner         tells the memory of requests and steps (vLLM's first runner)
    model_state    the same for vLLM's second runner
    releases       reads the memory anew when the directory holds another release
    scheduler      keeps what an edit's answer leaves in the cache apart from what other requests read
    block_names    names of the cache's blocks

The decision and the residual are :mod:`wisecli.routing`'s, as in transformers.
"""


def register() -> None:
    """Register edited model types with vLLM, which calls this in each of its processes."""
    from wisecli.vllm_plugin.registration import register_all

    register_all()
