import pytest
from support.every_type import tiny

from wisecli.models.layout.padding_probe import note_padding, reads_rows_alike
from wisecli.progress import Event


@pytest.mark.parametrize(("model_type", "alike"), [("llama", True), ("mamba2", True), ("trocr", False)])
def test_positions_that_count_the_padding_are_told(model_type: str, alike: bool) -> None:
    model = tiny(model_type)
    assert reads_rows_alike(model) is alike
    events: list[Event] = []
    note_padding(model, 8, events.append)
    note_padding(model, 1, events.append)
    assert ["batch_size=1" in str(event.note) for event in events] == [True] * (not alike)
