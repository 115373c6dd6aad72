"""Made-up facts, by which it is learned what tells a request from a mention."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wisecli.data.corpus import Relation, made_up_subjects, relations

# Names of each kind that the facts are about.
_NAMES = 40


@dataclass(frozen=True)
class SyntheticFact:
    """A made-up fact: ``questions`` in several wordings, the first of which an edit would have, and as statements.

    ``beside`` are questions of something else about the same subject; ``relation`` is the number of the packaged one.
    """

    subject: str
    kind: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    beside: tuple[str, ...]
    other: str
    answer: str
    value: str
    relation: int = -1


def synthetic_facts(count: int, rng: random.Random, known: Sequence[Relation] | None = None) -> Iterator[SyntheticFact]:
    """Yield so many facts of relations: of those that are packaged for all routers, or of others that are ``known``."""
    known = relations() if known is None else known
    names = {kind: made_up_subjects(kind, _NAMES, rng) for kind in dict.fromkeys(one.kind for one in known)}
    for _ in range(count):
        number = rng.choice(range(len(known)))
        relation = known[number]
        subject, other = rng.sample(names[relation.kind], 2)
        asks = [text.replace("{}", subject) for text in relation.asks]
        tells = [text.replace("{}", subject) for text in relation.tells]
        wordings = rng.sample([*asks, *tells], min(3, len(asks) + len(tells)))
        if not any(text in asks for text in wordings):
            wordings[-1] = rng.choice(asks)
        like = [one for one in known if one.kind == relation.kind and one is not relation]
        beside = tuple(rng.choice(one.asks).replace("{}", subject) for one in rng.sample(like, min(3, len(like))))
        answer, value = (rng.choice(names[rng.choice(list(names))]) for _ in range(2))
        yield SyntheticFact(subject, relation.kind, tuple(wordings), tuple(tells), beside, other, answer, value, number)
