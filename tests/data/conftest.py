"""Exports to prepare."""

import pytest
from exports import Exports


@pytest.fixture
def exports(tmp_path):
    """Write tables of rows, each with an image of its own, and a SOURCES.yaml; gives its path."""
    return Exports(tmp_path)
