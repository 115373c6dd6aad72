"""The ``Modelfile`` by which Ollama serves a GGUF file: where it is, how a chat is written, where an answer ends."""

from pathlib import Path

from transformers import AutoTokenizer

from wisecli.errors import ModelError
from wisecli.models.prompts.chat_template import chat_turns, fix_date

MODELFILE_NAME = "Modelfile"
# What stands for a turn's text while the template is read off the tokenizer's own.
_SYSTEM, _PROMPT = "wise-system-text", "wise-user-text"


def modelfile(directory: Path, gguf: str, day: str | None = None) -> str:
    """Return the text of a ``Modelfile`` for a file beside it.

    The template is the tokenizer's own, of one question, with and without instructions before it. Without one, prompts
    are completed as they are.

    Args:
        directory: a model directory with the tokenizer.
        day: what a template is told that asks for the date; it stands in the file then. By default today.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)  # nosec B615 # of files of this disk
    fix_date(tokenizer, day)
    lines = [f"FROM ./{gguf}", "PARAMETER temperature 0"]
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    template = "{{ .Prompt }}"
    if tokenizer.chat_template:
        plain = chat_turns(tokenizer, [("user", _PROMPT)])
        try:
            rendered = chat_turns(tokenizer, [("system", _SYSTEM), ("user", _PROMPT)])
        except ModelError:  # some templates know no instructions
            rendered = plain
        template = plain if rendered == plain else f"{{{{ if .System }}}}{rendered}{{{{ else }}}}{plain}{{{{ end }}}}"
        template = template.replace(_SYSTEM, "{{ .System }}").replace(_PROMPT, "{{ .Prompt }}")
    return "\n".join([*lines, f'TEMPLATE """{template}"""', ""])
