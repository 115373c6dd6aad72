import re

import pytest

from wisecli.config import PRESETS, EditSettings
from wisecli.editing.run.job import Job
from wisecli.errors import SettingsError


@pytest.mark.parametrize("settings", [EditSettings(pooling="mean"), EditSettings(writer="gradient", pooling="mean")])
def test_shards_that_keep_no_means_are_not_written_to_decide_by_them(settings: EditSettings) -> None:
    with pytest.raises(SettingsError, match=re.escape("--preset paper")):
        Job(model="model", settings=settings, edits=())


def test_the_papers_rule_keeps_means() -> None:
    settings = EditSettings(**PRESETS["paper"])
    assert Job(model="model", settings=settings, edits=()).settings.pooling == "mean"
