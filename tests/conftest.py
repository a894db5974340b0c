"""What all tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

gc.disable()  # until all tests are collected: what is imported and compiled for them is no garbage


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; those that look into one set a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGECOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_finish() -> None:
    """Collections of garbage from now on do not look through what was imported, a million objects."""
    gc.freeze()
    gc.enable()
