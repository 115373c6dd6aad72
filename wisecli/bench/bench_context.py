"""What all methods of `wise bench` take part in: the model, the records, and what is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wisecli.bench.answer_files import AnswerFolder
from wisecli.bench.edit_stream import digest_of
from wisecli.bench.editing_run import PortionProgress
from wisecli.bench.methods.base import Bench
from wisecli.bench.methods.evaluation import BaseModelAnswers
from wisecli.bench.result_row import RowMaker
from wisecli.config import BenchSettings, LoadOptions
from wisecli.data.corpus import unrelated_texts
from wisecli.edits.record import Edit
from wisecli.evaluation.protocols import Generated
from wisecli.io.checkpoint import Checkpoint
from wisecli.models.layout.layout_inference import find_layout
from wisecli.models.loading import load_model
from wisecli.progress import ProgressCallback

_TEXTS = 200
_TIMED = 32


@dataclass(frozen=True)
class BenchContext:
    """The model, the records that are edited, and those that may be learnt from; ``work`` is for what is not finished.

    ``domains`` names the dataset of each record that is edited.
    """

    directory: Path
    tested: Sequence[Edit]
    domains: Sequence[str]
    learnt: Sequence[Edit]
    settings: BenchSettings
    load: LoadOptions
    work: Path
    on_progress: ProgressCallback

    @cached_property
    def known(self) -> BaseModelAnswers:
        """What the unedited model says, and answers on disk, once for all methods."""
        return BaseModelAnswers(answers=AnswerFolder(self.work / "unedited"))

    @cached_property
    def learnt_digest(self) -> str:
        """Digest of the records that methods may learn from."""
        return digest_of(self.learnt)

    @cached_property
    def portion_watcher(self) -> PortionProgress:
        """What methods report to, which are given their edits in portions."""
        return PortionProgress(self.on_progress)

    @cached_property
    def bench(self) -> Bench:
        """What methods behind the protocol may use; the model is loaded once for all of them."""
        checkpoint = Checkpoint(self.directory)
        layout = find_layout(self.directory, checkpoint, load=self.load, on_progress=self.on_progress)
        loaded = load_model(self.directory, self.load)
        texts = unrelated_texts(_TEXTS, seed=self.settings.seed)
        size, seed = self.settings.batch_size, self.settings.seed
        return Bench(loaded, checkpoint, layout, self.learnt, texts, size, seed, self.portion_watcher)

    @property
    def generated(self) -> Generated:
        """Which generated figures are taken; WILD asks the unedited model, too, for locality."""
        settings = self.settings
        protocol = settings.protocol if settings.generate else "teacher"
        return Generated(protocol, settings.forms, settings.ask, before=True, kinds=settings.kinds)

    @property
    def maker(self) -> RowMaker:
        """Makes rows."""
        return RowMaker(self.domains, self.settings.resamples, self.settings.seed)

    def timed(self, count: int) -> list[tuple[str, str]]:
        """Return the prompts and answers by which an edited model's time is taken."""
        return [(edit.prompt, edit.target) for edit in self.tested[: min(count, _TIMED)]]
