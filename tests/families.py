"""The families of decoders, and the folders of their tiny bases in the fixture `bases`."""

import pytest

BASES = {"mllama": "decoder", "paligemma": "paligemma", "gemma3": "gemma3"}
FAMILY = pytest.mark.parametrize("family", BASES)
