import pytest
import torch
from support.byte_level import save_base
from support.loading import CPU

from wisecli.edits.record import Edit
from wisecli.export.stock.edit_states import EditText, ReadTexts
from wisecli.export.stock.router.subject_detectors import DetectorSettings, NameStates, name_states, subject_detectors
from wisecli.export.stock.subject_texts import texts_on_edits
from wisecli.export.stock.text_states import StateCapture
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.site import find_site
from wisecli.models.loading import load_model
from wisecli.models.prompts.tokenization import Row
from wisecli.progress import ignore_progress

LAYER, SHARE = 2, 0.05
# Names whose last letter is no other word's: more of a name a tiny model of random numbers does not hold.
EDITS = [
    Edit("one", "The mayor of Bravi§ is", "Ole", subject="Bravi§"),
    Edit("two", "The river of Qoz¶ is", "Ta", subject="Qoz¶"),
    Edit("three", "BRAVI§ lies in", "Norge", subject="BRAVI§"),
    Edit("four", "It is what it is", "so", subject=""),
    Edit("five", "The lake of Xanf is", "Ba", subject="Wexmor"),
]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> StateCapture:
    base = save_base(tmp_path_factory.mktemp("detectors") / "base", hidden_size=96, head_dim=24)
    return StateCapture(load_model(base, CPU), find_site(base, Checkpoint(base), LAYER), ignore_progress)


@pytest.fixture
def names(capture: StateCapture) -> NameStates:
    return name_states(capture, "tiny", share=SHARE)


@pytest.fixture(scope="module")
def read(capture: StateCapture) -> ReadTexts:
    """Texts on the edits' subjects, without answers."""
    texts = list(texts_on_edits(capture.loaded.tokenizer, [(EDITS[0], 0), (EDITS[1], 1), (EDITS[2], 0)]))
    at_router = capture.text_states([one.tokens for one in texts], "texts")
    return ReadTexts(
        tuple(EditText(Row(one.tokens, (0,)), one.subject, True, False) for one in texts), at_router, {}, frozenset()
    )


def test_edits_on_one_name_share_a_detector_and_some_have_none(
    capture: StateCapture, names: NameStates, read: ReadTexts
) -> None:
    found = subject_detectors(capture, EDITS, names, read)
    # The last edit's prompt does not name what is stated to be its subject.
    assert found.subject.tolist() == [0, 1, 0, -1, -1]
    assert found.directions.shape == (2, 96)


def test_detectors_fire_at_their_names_and_hardly_elsewhere(
    capture: StateCapture, names: NameStates, read: ReadTexts
) -> None:
    # Long directions: so small a model keeps little apart of a token and what stands before it.
    found = subject_detectors(capture, EDITS, names, read, settings=DetectorSettings(ridge=1e-4))
    texts = list(texts_on_edits(capture.loaded.tokenizer, [(EDITS[0], 0), (EDITS[1], 1), (EDITS[2], 0)]))
    at = read.at_router.first[:-1] + torch.tensor([one.place for one in texts])
    fired = found.readings(read.at_router.normed[at].float()) > 0
    own = torch.tensor([one.subject for one in texts])[:, None] == torch.arange(2)
    assert fired[own].float().mean() > 0.6
    assert fired[~own].float().mean() < 0.1
    assert (found.readings(names.others) > 0).float().mean() < 0.01


def test_without_subjects_there_are_no_detectors(capture: StateCapture, names: NameStates, read: ReadTexts) -> None:
    found = subject_detectors(capture, EDITS[3:], names, read)
    assert found.subject.tolist() == [-1, -1]
    assert found.readings(names.others[:3]).shape == (3, 0)


def test_what_names_are_told_from_is_read_once(
    capture: StateCapture, names: NameStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateCapture, "_read", None)
    again = name_states(capture, "tiny", share=SHARE)
    assert torch.equal(again.others, names.others)
    assert torch.equal(again.strayed, names.strayed)
    # Around each name they are moved from its own mean.
    assert names.strayed.mean(0).abs().max() < 1e-2
