"""Which tests run and in which order; what they share is in support/fixtures.py."""

import gc
import os

import pytest
from hypothesis import settings
from support.thorough import place_in_order

# Processes that tests start have one thread as well: several tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"

# Collecting makes many objects, all of which stay.
gc.disable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="whole sweeps, and every case of every matrix")


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("thorough")
    if config.getoption("--thorough"):
        settings.load_profile("thorough")
    # A process that has others run the tests need not import what they test.
    runs = hasattr(config, "workerinput") or config.getoption("dist", "no") == "no"
    if runs or config.getoption("collectonly"):
        config.pluginmanager.import_plugin("support.fixtures")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first; what is marked as thorough is left out unless it is asked for."""
    items.sort(key=place_in_order)
    if not config.getoption("--thorough"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker(pytest.mark.skip(reason="runs with --thorough"))
