"""Register edited checkpoints with vLLM: their configs and model classes, and the worker and scheduler they run with.

Everything is done through registries that vLLM has for it. None of vLLM's functions is replaced.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from wisecli.io.checkpoint import EXPORTED_KEY
from wisecli.routing.layers.module_types import reduce_by
from wisecli.vllm_plugin.engine_names import OP, PREFIX

_PACKAGE = __name__.rpartition(".")[0]
_SCHEDULER = f"{_PACKAGE}.scheduler.routed_scheduler"
# Of vLLM's operators, those that write keys and values.
_CACHE_OPS = ("vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update")


class EditedConfig(PretrainedConfig):
    """Reads the config of an edited checkpoint as its base's, with the side memory's description in it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a config of a subclass of the base's, so that vLLM treats it as it does the base's.

        Args:
            config_dict: the content of ``config.json``.
        """
        model_type = config_dict[EXPORTED_KEY]["model_type"]
        kind: Any = _CONFIG_REGISTRY[model_type] if model_type in _CONFIG_REGISTRY else CONFIG_MAPPING[model_type]
        own = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return _edited_class(kind).from_dict({**own, "model_type": model_type}, **kwargs)


@cache
def _edited_class(kind: Any) -> type[PretrainedConfig]:
    """Return a config class of another name than the base's, which it has as ``wise_base``.

    vLLM has transformers read edited checkpoints so, too, for the rest of the process. By the base's name it would find
    the base's model, and load that without the memory; now it refuses.
    """
    own = {"__module__": __name__, "__reduce_ex__": reduce_by(_edited_class, kind), "wise_base": kind}
    return type(f"Wise{kind.__name__}", (kind,), own)


class EditedSettings(VerifyAndUpdateConfig):  # type: ignore[misc]  # of a package without types
    """What vLLM does to its settings for an edited model: what it does for the base, and what routing needs."""

    base: type[VerifyAndUpdateConfig] | None = None

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Choose the worker and the scheduler of edited models.

        Raises:
            ValueError: something was asked for that edits do not go with.
        """
        if cls.base is not None:
            cls.base.verify_and_update_config(vllm_config)
        _choose(vllm_config)

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Do what vLLM does for the base."""
        if cls.base is not None:
            cls.base.verify_and_update_model_config(model_config)


def _choose(vllm_config: Any) -> None:
    """Set vLLM's worker and scheduler to this plugin's; refuse settings that edits cannot be served with."""
    from vllm.platforms import current_platform

    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.pipeline_parallel_size > 1:
        raise ValueError("an edited model cannot be cut into pipeline stages: use --tensor-parallel-size")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise ValueError("an edited model's prompts cannot be cut among processes: use --tensor-parallel-size")
    if parallel.use_ubatching:
        raise ValueError("an edited model's steps cannot be cut in two: leave out --enable-dbo and --ubatch-size")
    if getattr(vllm_config.speculative_config, "enable_adaptive_verification", False):
        raise ValueError(
            "an edited model must know how many tokens are guessed: leave out enable_adaptive_verification"
        )
    if vllm_config.use_v2_model_runner and vllm_config.lora_config is not None:
        raise ValueError("adapters beside edits run in vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
    if parallel.worker_cls != "auto":
        raise ValueError(f"an edited model needs a worker of its own, not {parallel.worker_cls}")
    parallel.worker_cls = f"{_PACKAGE}.workers.{'RoutedCPUWorker' if current_platform.is_cpu() else 'RoutedGPUWorker'}"
    if scheduling.scheduler_cls not in (None, _SCHEDULER):
        raise ValueError(f"an edited model needs a scheduler of its own, not {scheduling.scheduler_cls}")
    scheduling.scheduler_cls = _SCHEDULER
    if not current_platform.is_cpu():
        _stay_out_of_graphs(vllm_config.compilation_config)


def _stay_out_of_graphs(compilation: Any) -> None:
    """Have piecewise CUDA graphs cut where residuals are added: how many tokens are routed is no constant."""
    from vllm.config import CUDAGraphMode

    if compilation.splitting_ops is None:
        # All that vLLM cuts at if nothing is said.
        own = () if compilation.use_inductor_graph_partition else _CACHE_OPS
        compilation.splitting_ops = [*compilation._attention_ops, *own]
    if OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(OP)
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif compilation.cudagraph_mode.has_full_cudagraphs():
        raise ValueError("an edited model runs in piecewise CUDA graphs alone, not in full ones")


def register_all() -> None:
    """Register an edited form of every architecture and model type that vLLM and transformers have."""
    for architecture in list(ModelRegistry.get_supported_archs()):
        own = f"{PREFIX}{architecture}"
        if architecture.startswith(PREFIX) or own in MODELS_CONFIG_MAP:
            continue
        ModelRegistry.register_model(own, f"{_PACKAGE}.models:{own}")
        base = MODELS_CONFIG_MAP.get(architecture)
        MODELS_CONFIG_MAP[own] = type(f"{own}Settings", (EditedSettings,), {"base": base})
    for model_type in CONFIG_MAPPING.keys():  # noqa: SIM118  # which imports none of their modules
        edited = f"wise_{model_type}"
        _CONFIG_REGISTRY[edited] = type(f"Edited_{model_type}", (EditedConfig,), {"model_type": edited})
