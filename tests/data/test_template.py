"""Names between braces and nothing cleverer."""

import pytest

from medft.errors import RecipeError


def test_a_template_needs_its_names():
    from medft.data.template import fill_template

    assert fill_template("{a} {b}", {"a": "x", "b": None}) == "x"
    assert fill_template("{a}{b}", {"a": None, "b": float("nan")}) == ""
    with pytest.raises(RecipeError):
        fill_template("{a.b}", {"a": 1})
