from collections.abc import Iterator

import pytest
from support.spaces import Bench

from wisecli.models.running import quick_products


@pytest.fixture(autouse=True, scope="package")
def exact_products() -> Iterator[None]:
    """What is expected is computed in a model's own type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick_products, "has_quick_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()
