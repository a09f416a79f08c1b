"""Imports without garbage collection, which goes on after them as it was."""

import gc

import pytest

from opd.heavy_imports import uncollected


def _fails_to_import() -> None:
    with uncollected():
        assert not gc.isenabled()
        raise ImportError


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_inside_and_all_is_as_before_afterwards(on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ImportError):
            _fails_to_import()
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()
