import torch

from wisecli.memory.fitting import request_gate_fitting


def test_prompts_are_read_again_from_the_last_part_that_was_not_full() -> None:
    each = request_gate_fitting._AT_A_TIME
    one_form = torch.arange(3 * each)
    for known, begun in ((0, 0), (each - 1, 0), (each, each), (2 * each + 5, 2 * each)):
        assert request_gate_fitting._begun(one_form, known) == (begun, begun)
    three_forms = one_form // 3
    first = int(three_forms[2 * each])
    assert int(three_forms[2 * each - 1]) == first  # an edit's forms are read in two parts
    assert request_gate_fitting._begun(three_forms, first + 9) == (each, first)
    assert request_gate_fitting._begun(one_form[:each], each) == (each, each)
