"""The custom code of a routed checkpoint: the modules that it carries, the classes that use them, and their names."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)

from wisecli.export import resaving
from wisecli.io.digest import sha256_text
from wisecli.models.architectures import loader_name
from wisecli.routing import (
    decision,
    edited_states,
    fact_decision,
    fact_memory,
    generation,
    matrix_memory,
    meaning,
    names,
    passes,
    prompts,
    request_gate,
    roles,
    scores,
    serving,
    side_memory,
    spelling,
    token_cache,
)

CODE_NAME = "modeling_wise.py"
# The modules of the package that a checkpoint carries as they are, and the sha256 of those that 0.1 wrote.
_CARRIED = (
    *(
        side_memory,
        edited_states,
        decision,
        scores,
        fact_decision,
        fact_memory,
        matrix_memory,
        prompts,
        roles,
        passes,
        generation,
        token_cache,
    ),
    *(meaning, names, spelling, request_gate, serving, resaving),
)
CARRIED_NAMES = tuple(f"{module.__name__.rpartition('.')[2]}.py" for module in _CARRIED)
FORMER_CODE = {
    "wise_memory.py": "9319793273def048aee6a4bc87f8ad0a5458c94469fb0b41b211c61f6ad246b2",
    "prompt_gate.py": "516a76e4d9034eb70b43de1b6d29a16f9c4a97fc5d29f90b82ef5d8e779cee73",
}
# What has changed since in the code that uses them, and what stood there.
_SINCE = (
    (", GenerationMixin\n", "\n"),
    (", GenerationMixin):", "):"),
    (
        "from .generation import RoutedCausal\nfrom .passes import RoutedDecoder\nfrom .prompts import TurnMarks\n"
        "from .resaving import Resaved, manifest_of\nfrom .scores import SideMemory\n"
        "from .serving import require_memory, require_transformers\n"
        "from .side_memory import install",
        "from .wise_memory import SideMemory, install",
    ),
    ("(RoutedCausal, Resaved, ", "("),
    ("(RoutedDecoder, ", "("),
    (
        '    memory, marks = SideMemory.from_description(wise["memory"]), TurnMarks.from_dict(wise.get("marks"))\n'
        '    install(model, module, memory, transposed=wise["transposed"], marks=marks)\n',
        '    install(model, module, SideMemory.from_description(wise["memory"]), transposed=wise["transposed"])\n',
    ),
    ("    require_memory(model, model.wise_module)\n", ""),
    ("    model.wise_manifest = manifest_of(*args, **kwargs)\n", ""),
    ("    require_transformers(config.get_text_config()._attn_implementation)\n", ""),
    ("    model.wise_module = module\n", ""),
)
# What it ended with then: an answer could not be guessed ahead.
_ENDED = """
    def generate(self, *args, **kwargs):
        ahead = ("assistant_model", "prompt_lookup_num_tokens")
        if self.config.wise["memory"]["routing"] == "sequence" and any(kwargs.get(name) for name in ahead):
            # Guessed tokens come with the prompt, whose last token would not be the last one read.
            raise ValueError("this model decides once a prompt what answers it: decode it without guessing ahead")
        return super().generate(*args, **kwargs)
"""
# Classes of models with their head, by the class that loads them.
_WITH_HEAD = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}
# Who else loads what a loader does: of models that read images, `transformers serve`.
_LOADERS = {
    "AutoModelForCausalLM": ("AutoModelForCausalLM",),
    "AutoModelForImageTextToText": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
}


def code_files(model_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """Names of transformers' classes for a base of this type, and the custom code of its routed checkpoints, by file.

    Raises:
        ValueError, KeyError: transformers has no language model of that type.
    """
    kind, loader = type(AutoConfig.for_model(model_type)), loader_name(model_type)
    names = {"config": kind.__name__, "model_type": model_type, "loader": loader}
    for name, mapping in (("base", MODEL_MAPPING), ("causal", _WITH_HEAD[loader])):
        names[name] = str(mapping[kind].__name__)  # type: ignore[attr-defined]  # the stubs allow for pairs
    template = resources.files("wisecli").joinpath("data/modeling_wise.py.tmpl").read_text(encoding="utf-8")
    code = Template(template).substitute(names, architecture=names["causal"])
    carried = zip(CARRIED_NAMES, _CARRIED, strict=True)
    own = {name: Path(str(module.__file__)).read_text(encoding="utf-8") for name, module in carried}
    return names, {CODE_NAME: code, **own}


def former_code(files: dict[str, str]) -> dict[str, str]:
    """The sha256 of the custom code that version 0.1 wrote, by file.

    Args:
        files: this version's code for the same model type, as :func:`code_files` gives it.
    """
    code = files[CODE_NAME]
    for now, then in _SINCE:
        code = code.replace(now, then)
    return {CODE_NAME: sha256_text(code + _ENDED), **FORMER_CODE}


def auto_map(names: dict[str, str]) -> dict[str, str]:
    """Which class of the custom code each of transformers' loaders takes.

    Args:
        names: as :func:`code_files` gives them.
    """
    loaders = {"AutoConfig": "config", "AutoModel": "base", **dict.fromkeys(_LOADERS[names["loader"]], "causal")}
    module = CODE_NAME.removesuffix(".py")
    return {loader: f"{module}.Wise{names[name]}" for loader, name in loaders.items()}
