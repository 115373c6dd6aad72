"""Of several edits on one fact one stands for all, or where answers differ each is closed by the others' prompts."""

import torch
from support.drawing import normal
from torch.nn import functional as F

from wisecli.edits.record import Edit
from wisecli.export.stock.router.relation_reader import ReaderSizes, RelationReader
from wisecli.export.stock.router.router_fitting import OwnQuestions, edit_relations, one_of_each_fact, told_apart

CODE, WAYS = 12, 5
# The first three ask one relation of one subject, the last of these with another answer; the fourth asks another
# relation of it, and the fifth the first relation of another subject.
ANSWERS = ["Oslo", "Oslo", "Bergen", "Oslo", "Oslo"]
EDITS = [Edit(str(number), f"prompt {number}", answer) for number, answer in enumerate(ANSWERS)]
SUBJECT = torch.tensor([0, 0, 0, 0, 1])
RELATION = torch.tensor([0, 0, 0, 1, 0])


def asked() -> OwnQuestions:
    """Codes of a relation, moved a little by each edit's wording and less by the form."""
    edit = torch.arange(len(EDITS)).repeat_interleave(WAYS)
    relation = 9 * F.one_hot(RELATION[edit], CODE) + 1.2 * normal(len(EDITS), CODE, seed=1)[edit]
    return OwnQuestions(relation + 0.1 * normal(len(edit), CODE, seed=2), torch.zeros(25), edit)


def test_of_edits_on_one_fact_the_last_with_the_same_answer_stands_for_all() -> None:
    assert one_of_each_fact(asked(), SUBJECT, EDITS) == [1, 1, 2, 3, 4]
    # Without a subject nobody knows whether it is one fact.
    assert one_of_each_fact(asked(), torch.full((5,), -1), EDITS) == [0, 1, 2, 3, 4]


def test_an_edit_with_another_answer_is_closed_by_the_others_prompts() -> None:
    reader, questions = RelationReader(ReaderSizes(8, 4, 4, 4, 1, 1, 8, CODE)), asked()
    relations, least = edit_relations(reader, questions, len(EDITS))
    thresholds = least - 1
    told = told_apart(reader, questions, relations, thresholds, SUBJECT)
    kappa = float(reader.kappa.detach())

    def open_for(made: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return kappa * questions.codes @ made[0].T > made[1]

    before, after = open_for((relations, thresholds)), open_for(told)
    own = questions.edit[:, None] == torch.arange(len(EDITS))
    assert before[own].all()
    assert after[own].all()
    of_first_three = questions.edit < 3
    others = ~own[of_first_three][:, :3]
    assert before[of_first_three][:, :3][others].any()
    assert not after[of_first_three][:, :3][others].any()
    # All other edits stay as they were.
    assert torch.equal(told[0][3:], relations[3:])
    assert torch.equal(told[1][3:], thresholds[3:])
