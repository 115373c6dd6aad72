"""Routers that are certain: an edit opens behind the very prompt that it was made with, whatever a tiny model knows.

A tiny model of random numbers, to which most words are one token, has nothing to tell names and relations by.
"""

import math

import torch

from wisecli.artifacts.memory_manifest import Manifest
from wisecli.data.corpus import unrelated_texts
from wisecli.export.stock.edit_states import read_texts
from wisecli.export.stock.router.answer_places import Elsewhere, GoingOn, answer_places
from wisecli.export.stock.router.answer_values import answer_values
from wisecli.export.stock.router.relation_reader import ReaderSizes, RelationReader
from wisecli.export.stock.router.router_blocks import Router, Scales
from wisecli.export.stock.router.separation import Separation
from wisecli.export.stock.router.subject_detectors import SubjectDetectors
from wisecli.export.stock.text_states import StateCapture, rotation_of
from wisecli.models.loading import Loaded
from wisecli.progress import ignore_progress


@torch.no_grad()
def certain_router(loaded: Loaded, manifest: Manifest, *_: object, **__: object) -> Router:
    """In place of `fitted_router`: detectors of edits' own prompts' last tokens, and a reader that always asks."""
    site, edits = manifest.site, manifest.edits
    prompts = [loaded.tokenizer(edit.prompt)["input_ids"] for edit in edits]
    answered = [
        [*prompt, *loaded.tokenizer(edit.answer)["input_ids"]] for prompt, edit in zip(prompts, edits, strict=True)
    ]
    texts = [*answered, *(loaded.tokenizer(text)["input_ids"] for text in unrelated_texts(60, seed=2))]
    capture = StateCapture(loaded, site, ignore_progress)
    read, last = capture.router_and_last(texts, "texts")
    places = read.first[: len(edits)] + torch.tensor([len(prompt) - 1 for prompt in prompts])
    own = torch.zeros(len(read.normed), dtype=torch.bool).index_fill(0, places, True)
    states = read.normed.float()
    directions, offsets = Separation(states[places], torch.arange(len(edits)), states[~own], 1e-4).solved()
    detectors = SubjectDetectors(directions, offsets - 0.5, torch.arange(len(edits)))
    of_edits = read_texts(capture, manifest)
    answers = of_edits.answers(of_edits.last)
    length = math.sqrt(site.d) / float(last.inverse.median())
    elsewhere = Elsewhere(last.normed[last.first[len(edits)] :].float(), states[:0])
    added = answer_values(loaded, site, answers.then) * length
    said = answer_places(answers, elsewhere, added, len(edits))
    reader = RelationReader(ReaderSizes(site.d, 8, 8, 8, 1, 1, loaded.model.config.head_dim, 4)).eval()
    reader.output.weight.zero_()
    relations, thresholds = torch.zeros(len(edits), 4), torch.full((len(edits),), -5.0)
    by = [float(states.inverse.median()) for states in (read, last)]
    # Wherever its subject is found an edit is open.
    going_on = GoingOn(torch.zeros(len(edits), site.d + 1), torch.eye(site.d + 1)[-1])
    scales = Scales(*by, rotation_of(loaded, site, 1).scaling)
    return Router(reader, relations, thresholds, detectors, going_on, said, scales)
