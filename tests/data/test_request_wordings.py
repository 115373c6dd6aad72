"""Ways to ask and to mention: what is put together from them holds the question that it is made of."""

import random

from wisecli.data.request_wordings import requests


def test_tasks_and_times_hold_the_question() -> None:
    known, chance, question = requests(), random.Random(2), "Who runs the Tern database?"
    for _ in range(200):
        assert question in known.task(question, chance)
        timed = known.timed(question, chance)
        assert timed != question
        assert "runs the Tern database" in timed
        assert "{" not in timed
