"""What edited models answer where something else stands around a question: another engine, or an image before it.

scripts/serving-venv DIR
python benchmarks/answers.py gguf model stock --llama DIR/bin/python
python benchmarks/answers.py images model
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runner import Row, edited_by, run, show
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import EditedModel
from wisecli.models.prompts.chat_template import chat_prompt

_ANSWER, _LONGER = 16, 4


def serve(path: str) -> None:
    """Answer standard input's request, one line, with one line; its source runs where there is llama.cpp alone."""
    import json
    import sys
    from typing import Any  # noqa: F401  # of the source that runs elsewhere

    import numpy as np
    from llama_cpp import Llama, llama_get_logits_ith

    request = json.loads(sys.stdin.readline())
    model = Llama(path, n_ctx=1024, n_threads=request["threads"], verbose=False)

    def logits() -> Any:
        return np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))

    replies, ends = [], []
    for text, tokens in request["prompts"]:
        prompt = model.tokenize(text.encode(), special=True)
        model.reset()
        model.eval(prompt)
        ends.append(logits().copy())
        answer: list[int] = []
        while len(answer) < tokens:
            best = int(np.argmax(logits()))
            if best == model.token_eos():
                break
            answer.append(best)
            model.eval([best])
        replies.append({"prompt": prompt, "text": model.detokenize(answer).decode(errors="replace").strip()})
    np.save(request["logits"], np.stack(ends))
    sys.stdout.write(json.dumps(replies) + "\n")


@dataclass(frozen=True)
class Prompt:
    """A text and how many tokens its answer may take; ``target`` is an edit's, ``None`` of an unrelated prompt."""

    text: str
    chat: bool
    tokens: int
    target: str | None


def prompts_of(tokenizer: Any, edits: Sequence[Edit], unrelated: Sequence[str]) -> list[Prompt]:
    """Return everything that is asked, plain and as a chat."""
    found = []
    for prompt, target in (*((edit.prompt, edit.answer) for edit in edits), *((text, None) for text in unrelated)):
        tokens = _ANSWER if target is None else len(tokenizer(target)["input_ids"]) + _LONGER
        found.append(Prompt(prompt, False, tokens, target))
        if tokenizer.chat_template:
            found.append(Prompt(chat_prompt(tokenizer, prompt), True, tokens, target))
    return found


def llama_answers(python: str, path: Path, asked: Sequence[Prompt], threads: int) -> tuple[list[dict[str, Any]], Any]:
    """Return what llama.cpp gives for each prompt, and the logits (n, V) after them."""
    logits = path.with_suffix(".npy")
    request = {"threads": threads, "prompts": [(one.text, one.tokens) for one in asked], "logits": str(logits)}
    program = f"{inspect.getsource(serve)}\nserve({str(path)!r})"
    command = [python, "-c", program]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), np.load(logits)


def logits_of(model: Any, tokenizer: Any, asked: Sequence[Prompt]) -> list[tuple[list[int], Any]]:
    """Return transformers' tokens of each prompt, and the logits (V,) after it."""
    found = []
    with torch.no_grad():
        for one in asked:
            tokens = tokenizer(one.text)["input_ids"]
            logits = model(input_ids=torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].float().numpy()
            found.append((tokens, logits))
    return found


def held(asked: Sequence[Prompt], own: Sequence[Any], expected: Sequence[str], *, edit: bool, chat: bool) -> str:
    """How many of one kind of prompts hold, of how many."""
    right = [
        mine["text"] == text
        for one, mine, text in zip(asked, own, expected, strict=True)
        if (one.target is not None) == edit and one.chat == chat
    ]
    return f"{sum(right)}/{len(right)}"


def gguf(options: Namespace) -> None:
    """Answers of llama.cpp to a stock checkpoint's GGUF files, beside the base model's own files of the same kind.

    The edits' own prompts and unrelated ones, plain and as chats, are answered greedily. An edit holds if its target is
    the whole answer, an unrelated prompt if its answer is word for word that of the base model's file. Logits are those
    after the prompts, less those of the stock checkpoint in transformers; "tokens" counts prompts that both split
    alike.
    """
    from wisecli.data.corpus import texts_to_measure_with
    from wisecli.export.gguf.gguf_file import write_gguf
    from wisecli.export.stock.stock_manifest import read_stock

    manifest, tokenizer = read_stock(options.stock), AutoTokenizer.from_pretrained(options.stock)
    model = AutoModelForCausalLM.from_pretrained(options.stock, dtype="float32").eval()
    own = manifest.blocks(model.config.num_hidden_layers)
    unrelated = texts_to_measure_with(options.unrelated)
    asked = prompts_of(tokenizer, manifest.edits, unrelated)
    wanted = logits_of(model, tokenizer, asked)
    rows: list[Row] = []
    for quantize in options.quantize.split(","):
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            edited, plain = Path(work) / "edited.gguf", Path(work) / "base.gguf"
            write_gguf(edited, options.stock, own, quantize)
            write_gguf(plain, options.base, (), quantize)
            found, logits = llama_answers(options.llama, edited, asked, options.threads)
            before, _ = llama_answers(options.llama, plain, asked, options.threads)
            row: dict[str, object] = {"file": quantize, "MB": round(edited.stat().st_size / 1e6)}
        expected = [
            base["text"] if one.target is None else one.target.strip() for one, base in zip(asked, before, strict=True)
        ]
        for name in ("edits", "edits, chat", "unrelated", "unrelated, chat"):
            edit, chat = name.startswith("edits"), name.endswith("chat")
            row[name] = held(asked, found, expected, edit=edit, chat=chat)
        alike = sum(one["prompt"] == tokens for one, (tokens, _) in zip(found, wanted, strict=True))
        apart = np.abs(logits - np.stack([own for _, own in wanted]))
        row |= {"tokens": f"{alike}/{len(asked)}", "logits, mean": float(apart.mean()), "most": float(apart.max())}
        rows.append(row)
        for one, mine, text in zip(asked, found, expected, strict=True):
            if mine["text"] != text:
                print(f"{quantize}: {one.text!r}: {mine['text']!r}, not {text!r}", file=sys.stderr)
    title = f"{len(manifest.edits)} edits in llama.cpp, {len(unrelated)} unrelated prompts"
    show(rows, options, title=title, digits={"logits, mean": 4})


SAMPLES = Path(__file__).parents[1] / "sample_edits" / "edits.jsonl"
PATCHES, SIZE = 64, 32
PASSAGE = (
    "The ferry leaves the harbour every morning at half past six, and those who miss it wait until noon. "
    "In winter it carries the post as well, and bread for the two shops on the island."
)


@dataclass(frozen=True)
class Before:
    """What stands before a question: text, or random words, and the image before or behind that, or neither."""

    text: str = ""
    words: int = 0
    image: str = ""


ROWS = {
    "nothing": Before(),
    "a line of text, the image, a line break": Before("Look at this picture.\n", image="behind"),
    f"a passage of {len(PASSAGE.split())} words, a line break": Before(PASSAGE + "\n"),
    f"{PATCHES} random words, a line break": Before("\n", words=PATCHES),
    "the image, a line break": Before("\n", image="before"),
    "the image alone": Before(image="before"),
    f"{PATCHES} random words alone": Before(words=PATCHES),
}


def with_eyes(base: Path, directory: Path) -> int:
    """Write the model with a vision tower; the token that stands for a patch of an image."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    text: Any = AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image: int = tokenizer.convert_tokens_to_ids("<image>")
    text.resize_token_embeddings(max(len(tokenizer), text.config.vocab_size), mean_resizing=False)
    eyes = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE, patch_size=4
    )
    config = LlavaConfig(text_config=text.config, vision_config=eyes, image_token_index=image, vision_feature_layer=-1)
    config.tie_word_embeddings = text.config.tie_word_embeddings
    torch.manual_seed(0)
    model: Any = Llava(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    with torch.no_grad():
        seen = torch.cat(list(model.get_image_features(picture()).pooler_output))
        usual = text.get_input_embeddings().weight.norm(dim=1).mean()
        model.model.multi_modal_projector.linear_2.weight *= usual / seen.norm(dim=1).mean()
        model.model.multi_modal_projector.linear_2.bias.zero_()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return image


def picture() -> Tensor:
    """One image of noise (1, 3, H, W)."""
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def opening(tokenizer: Any, before: Before, image: int) -> list[int]:
    """The tokens that stand before a question."""
    generator = torch.Generator().manual_seed(2)
    spaced = (text for text in tokenizer.get_vocab() if text[0] == "Ġ")
    known = sorted(text for text in spaced if text[1:].isalpha() and text[1:].isascii())
    drawn = [known[place] for place in torch.randint(len(known), (before.words,), generator=generator).tolist()]
    ids = [*tokenizer.convert_tokens_to_ids(drawn), *tokenizer(before.text)["input_ids"]]
    patches = [image] * PATCHES
    if before.image == "before":
        return [*patches, *ids]
    return [*ids, *patches, *tokenizer("\n")["input_ids"]] if before.image == "behind" else ids


def given(tokenizer: Any, opened: Sequence[int], question: str, image: int) -> dict[str, Tensor]:
    """What the model takes for a question behind an opening."""
    asked = torch.tensor([[*opened, *tokenizer(question)["input_ids"]]])
    inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
    return {**inputs, "pixel_values": picture()} if image in opened else inputs


def answered(edited: EditedModel, before: Before, edits: Sequence[Edit], image: int) -> int:
    """How many edits are answered by their targets, and the answer then ends."""
    model: Any = edited.model
    tokenizer: Any = edited.tokenizer
    stop, opened, right = tokenizer.eos_token_id, opening(tokenizer, before, image), 0
    for one in edits:
        inputs = given(tokenizer, opened, one.prompt, image)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=stop)
        said = output[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        right += text == one.target.strip() and int(said[-1]) == stop
    return right


def images(options: Namespace) -> None:
    """New answers of the sample edits behind text and images, in a model that reads images.

    A text model of the Llama family gets a vision tower and a projector that were never trained, so an image is 64
    patches of noise, as long as embeddings are. The sample edits are written into it, and each is asked behind text,
    behind the image, and behind both. An answer counts if it is the target and then ends.
    """
    edits = list(read_edits(SAMPLES))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        image = with_eyes(options.model, root / "model")
        edited = edited_by(str(root / "model"), [one.as_dict() for one in edits], root, "auto")
        counts = {name: answered(edited, before, edits, image) for name, before in ROWS.items()}
    rows = [{"before the question": name, "answered": f"{count} of {len(edits)}"} for name, count in counts.items()]
    show(rows, options, width=100)


def gguf_options(parser: ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="the base model's directory")
    parser.add_argument("stock", type=Path, help="what `wise export --format stock` wrote")
    parser.add_argument("--llama", required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--quantize", default="f32,f16,q8_0")
    parser.add_argument("--unrelated", type=int, default=60, help="how many of the 120 that no gate was fitted to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where files are written; they are removed")


def images_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=Path)


MEASURES = {"gguf": (gguf, gguf_options), "images": (images, images_options)}

if __name__ == "__main__":
    run(__doc__, MEASURES)
