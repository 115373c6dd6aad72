"""The custom code of a routed checkpoint: the modules that it carries, the classes that use them, and their names."""

import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any, cast

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from wisecli.data.packaged import packaged_text
from wisecli.errors import ModelError
from wisecli.io.digest import sha256_text
from wisecli.models.layout.architectures import DEFAULT_LOADER, loader_name

CODE_NAME = "modeling_wise.py"
# The modules of the package that a checkpoint carries as they are, and the sha256 of those that 0.1 wrote. None of them
# is imported to copy it.
_CARRIED = {
    "routing.layers": ("routed_layer", "layer_output_memory", "layer_states", "module_types"),
    "routing.memories": ("side_memory", "answer_pairs", "fact_memory", "matrix_memory"),
    "routing.passes": (
        *("routed_pass", "window_reading", "forward_arguments", "routed_generation", "token_cache", "engine_checks"),
    ),
    "routing.deciding": (
        *("decision", "fact_candidates", "fact_decision", "prompt_window", "late_interaction", "subject_match"),
        *("prompt_words", "fuzzy_match", "question_words", "misspelt_names"),
    ),
    "routing.gating": ("gates", "request_gate", "sentence_features", "name_features", "two_requests"),
    "export.routed": ("resaving",),
    "io": ("digest",),
}
CARRIED_NAMES = tuple(f"{name}.py" for names in _CARRIED.values() for name in names)
FORMER_CODE = {
    "wise_memory.py": "9319793273def048aee6a4bc87f8ad0a5458c94469fb0b41b211c61f6ad246b2",
    "prompt_gate.py": "516a76e4d9034eb70b43de1b6d29a16f9c4a97fc5d29f90b82ef5d8e779cee73",
}
# A checkpoint has them all in one folder.
_IMPORT = re.compile(r"^from wisecli\.(?:\w+\.)*(\w+) import", re.MULTILINE)
# Classes of models with their head, by the class that loads them.
_WITH_HEAD = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
# Who else loads what a loader does: of models that read images, `transformers serve`.
_LOADERS = {
    "AutoModelForCausalLM": ("AutoModelForCausalLM",),
    "AutoModelForImageTextToText": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
}
# What loads each class of a base that comes with its own code: without the first and the last there is no such base.
_OWN = ("AutoConfig", "AutoModel", DEFAULT_LOADER)
_TYPE, _CLASS = re.compile(r"[\w.-]+"), re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")


def own_classes(model_type: str, named: object) -> dict[str, str]:
    """Return the classes of a base's own code, by what loads each; none of a type that transformers has.

    Args:
        named: what the base's config says of them.

    Raises:
        ModelError: they are in no file beside the config.
    """
    known = any(model_type in names for names in _WITH_HEAD.values())
    if known or not isinstance(named, dict) or not {_OWN[0], _OWN[-1]} <= named.keys():
        return {}
    own = {loader: str(named[loader]) for loader in _OWN if loader in named}
    if not _TYPE.fullmatch(model_type) or not all(map(_CLASS.fullmatch, own.values())):
        raise ModelError(
            "the base's own code is elsewhere than beside its config.json, or its names are none of Python's: load the "
            "model with trust_remote_code=True, save it with its code, and edit what was saved"
        )
    return own


def code_files(model_type: str, own: Mapping[str, str]) -> dict[str, str]:
    """Return the custom code of routed checkpoints of a base of this type, by file.

    Args:
        own: the classes of the base's own code.

    Raises:
        ValueError, KeyError: transformers has no language model of that type.
    """
    names = {"architecture": base_class(model_type, own), "model_type": model_type}
    names |= {"loaders": repr(auto_map(model_type)), "own": _imported(model_type, own)}
    code = _filled("modeling_wise.py.tmpl", names)
    sources = (files(f"wisecli.{package}") / f"{name}.py" for package, names in _CARRIED.items() for name in names)
    carried = {source.name: source.read_text(encoding="utf-8") for source in sources}
    return {CODE_NAME: code, **{name: _IMPORT.sub(r"from .\1 import", text) for name, text in carried.items()}}


def _imported(model_type: str, own: Mapping[str, str]) -> str:
    """Return the lines that make the classes of a base's own code known to transformers."""
    modules = {loader: name.split(".") for loader, name in own.items()}
    lines = [f"from .{module} import {name}" for module, name in modules.values()]
    for loader, (_, name) in modules.items():
        kind = f'"{model_type}"' if loader == _OWN[0] else modules[_OWN[0]][1]
        lines.append(f"transformers.{loader}.register({kind}, {name}, exist_ok=True)")
    return "".join(f"{line}\n" for line in lines)


def base_class(model_type: str, own: Mapping[str, str]) -> str:
    """Return the name of the class of models of a type, with their head: transformers', or that of the base's own code.

    Raises:
        ValueError, KeyError: there is none.
    """
    if own:
        return own[DEFAULT_LOADER].rpartition(".")[2]
    return _class_name(_WITH_HEAD[loader_name(model_type)], model_type)


def former_code(model_type: str) -> dict[str, str]:
    """Return the sha256 of the custom code that version 0.1 wrote, by file.

    Raises:
        ValueError, KeyError: transformers has no language model of that type.
    """
    config, loader = type(AutoConfig.for_model(model_type)).__name__, loader_name(model_type)
    names = {"config": config, "model_type": model_type, "causal": base_class(model_type, {})}
    names |= {"base": _class_name(MODEL_MAPPING_NAMES, model_type), "architecture": names["causal"], "loader": loader}
    return {CODE_NAME: sha256_text(_filled("modeling_wise_0.1.py.tmpl", names)), **FORMER_CODE}


def _class_name(names: Mapping[str, Any], model_type: str) -> str:
    """Return the name of a model type's class, the first if it has several, without importing it."""
    kind = type(AutoConfig.for_model(model_type))
    if kind.model_type not in names:  # one that somebody registered
        return cast(type, MODEL_FOR_CAUSAL_LM_MAPPING[kind]).__name__
    name = names[kind.model_type]
    return str(name if isinstance(name, str) else name[0])


def _filled(template: str, names: dict[str, str]) -> str:
    return Template(packaged_text(template)).substitute(names)


def auto_map(model_type: str) -> dict[str, str]:
    """Return which class of the custom code each of transformers' loaders takes: those that load the base as one."""
    named = loader_name(model_type)
    kind = _WITH_HEAD[named].get(model_type)
    alike = [loader for loader, names in _WITH_HEAD.items() if loader == named or names.get(model_type, "") == kind]
    loaders = [one for loader in alike for one in _LOADERS[loader]]
    module = CODE_NAME.removesuffix(".py")
    classes = {"AutoConfig": "WiseConfig", "AutoModel": "WiseModel", **dict.fromkeys(loaders, "WiseForCausalLM")}
    return {loader: f"{module}.{name}" for loader, name in classes.items()}


def former_auto_map(model_type: str) -> dict[str, str]:
    """Return the same for version 0.1."""
    loaders, module = _LOADERS[loader_name(model_type)], CODE_NAME.removesuffix(".py")
    config = type(AutoConfig.for_model(model_type)).__name__
    classes = {"AutoConfig": config, "AutoModel": _class_name(MODEL_MAPPING_NAMES, model_type)}
    classes |= dict.fromkeys(loaders, base_class(model_type, {}))
    return {loader: f"{module}.Wise{name}" for loader, name in classes.items()}
