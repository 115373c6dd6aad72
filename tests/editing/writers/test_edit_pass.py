"""What the margins of an edit see where all its rows and its unrelated text are one padded pass."""

from dataclasses import replace

import torch

from wisecli.config import EditSettings
from wisecli.editing.examples.training_examples import TrainingExamples, capture_groups
from wisecli.editing.writers.edit_pass import UnrelatedText, edit_passes, padded, unrelated_texts_of
from wisecli.edits.record import Edit
from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded
from wisecli.models.prompts.tokenization import NO_LABEL, Row, collate
from wisecli.progress import ignore_progress

EDITS = [Edit("one", "ba be bi", "do du"), Edit("two", "ka ke ki ko", "fa", irrelevant=("ta te",))]
CONTEXTS = ((0, ""), (1, "pa pe. "))
COUNTED = EditSettings(writer="gradient", schedule="sequential", pooling="mean", padding="counted")


def batches_of(loaded: Loaded, site: MatrixSite) -> list[TrainingExamples]:
    groups = [([one], CONTEXTS, ()) for one in enumerate(EDITS)]
    found = capture_groups(loaded, site, groups, batch_size=32, train_end=False, window=False)
    return [examples for group in found for examples in group]


def test_rows_end_together_whole_and_the_unrelated_text_is_the_last() -> None:
    batch = collate([Row((5, 6, 7), (8, 9)), Row((4,), (8, 9))])
    found = padded(batch, [1, 2, 3], 0)
    assert found.ids.tolist() == [[5, 6, 7, 8, 9], [0, 0, 4, 8, 9], [0, 0, 1, 2, 3]]
    assert found.mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert found.start == 2
    assert found.labels.tolist() == [[8, 9, NO_LABEL], [8, 9, NO_LABEL], [NO_LABEL] * 3]
    assert found.targets.tolist() == [8, 9, 8, 9]


def test_below_a_longer_unrelated_text_prompts_ends_are_learnt_as_well() -> None:
    batch = collate([Row((5, 6, 7), (8,)), Row((4,), (8,))])
    found = padded(batch, [1, 2, 3, 4, 5, 6], 0)
    assert found.ids[:2].tolist() == [[0, 0, 5, 6, 7, 8], [0, 0, 0, 0, 4, 8]]
    assert found.labels.tolist() == [[6, 7, 8, NO_LABEL], [NO_LABEL, 4, 8, NO_LABEL], [NO_LABEL] * 4]


def test_an_edits_own_unrelated_text_stands_beside_it_and_else_one_of_the_package() -> None:
    found = unrelated_texts_of(EDITS, range(2), seed=0)
    assert found[1] == UnrelatedText("ta te", is_own=True)
    assert not found[0].is_own
    assert len(found[0].text) > 0


@torch.no_grad()
def test_keys_are_those_of_the_whole_model_on_the_same_padded_rows(loaded: Loaded, site: MatrixSite) -> None:
    texts = {0: UnrelatedText("ta te ti to tu " * 9, is_own=False), 1: UnrelatedText("ta te", is_own=True)}
    passes = edit_passes(loaded, site, COUNTED, batches_of(loaded, site), texts, ignore_progress)
    assert [one.edits for one in passes] == [(0, 0), (1, 1)]
    for number, own in enumerate(passes):
        rows = [
            loaded.tokenizer(f"{context}{EDITS[number].prompt} {EDITS[number].target}")["input_ids"]
            for _, context in CONTEXTS
        ]
        width = max(map(len, rows))
        # One of the package's own is cut to what the rows take.
        rows.append(loaded.tokenizer(texts[number].text)["input_ids"][: width if number == 0 else None])
        padding = loaded.tokenizer.pad_token_id
        padding = loaded.tokenizer.eos_token_id if padding is None else padding
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        seen: list[torch.Tensor] = []
        handle = site.watched(loaded.model).register_forward_pre_hook(lambda _, given, to=seen: to.append(given[0]))
        loaded.model(ids, attention_mask=mask, use_cache=False)
        handle.remove()
        torch.testing.assert_close(own.activations.keys, seen[0][:-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.unrelated, seen[0][-1], rtol=1e-3, atol=1e-4)
        assert own.counted.shape == (2, width)
        assert own.counted.all()


def test_padding_and_the_last_token_of_a_target_do_not_count_unless_asked_for(loaded: Loaded, site: MatrixSite) -> None:
    texts = dict.fromkeys(range(2), UnrelatedText("ta te ti", is_own=True))
    settings = replace(COUNTED, padding="left-out")
    passes = edit_passes(loaded, site, settings, batches_of(loaded, site), texts, ignore_progress)
    for own in passes:
        assert torch.equal(own.counted, own.activations.batch.mask.bool())
        assert not own.counted.all()
        assert len(own.unrelated) == len(loaded.tokenizer("ta te ti")["input_ids"])
