import pytest
from support.helpers import save_tiny, site_of
from support.loading import CPU

from wisecli.models.layout.site import MatrixSite
from wisecli.models.loading import Loaded, load_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_model(save_tiny(tmp_path_factory.mktemp("base") / "model"), load=CPU)


@pytest.fixture(scope="module")
def site(loaded: Loaded) -> MatrixSite:
    return site_of(loaded.model, 2)
