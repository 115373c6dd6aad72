"""What an image before a question does to edits: new answers of the sample edits in a model that reads images.

    python benchmarks/images.py MODEL

A text model of the Llama family gets a vision tower and a projector that were never trained, so an image is 64 patches
of noise, as long as embeddings are. The sample edits are then written into it, once for each way to route, and each is
asked behind text, behind the image, and behind both. An answer counts if it is the target and then ends.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from wisecli.commands.edit.edit import edit
from wisecli.commands.memory.merge import merge
from wisecli.config import EditSettings, MergeSettings
from wisecli.edits.record import Edit, read_edits
from wisecli.evaluation.edited_model import EditedModel, attach

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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    base = parser.parse_args().model
    edits = list(read_edits(SAMPLES))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        image = with_eyes(base, root / "model")
        edit(str(root / "model"), SAMPLES, root / "shards", EditSettings())
        merge([root / "shards"], root / "memory", MergeSettings())
        edited = attach(root / "memory")
        table = Table("before the question", "answered")
        for row, before in ROWS.items():
            table.add_row(row, f"{answered(edited, before, edits, image)} of {len(edits)}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
