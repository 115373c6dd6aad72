import pytest
from support.every_type import tiny

from wisecli.models.layout.padding_probe import reads_rows_alike


@pytest.mark.parametrize(("model_type", "alike"), [("llama", True), ("mamba2", True), ("trocr", False)])
def test_positions_that_count_the_padding_are_found(model_type: str, alike: bool) -> None:
    assert reads_rows_alike(tiny(model_type)) is alike
