"""The verdict of the suite does not depend on luck."""

from __future__ import annotations

import pytest
from hypothesis import settings


def test_the_same_examples_are_drawn_in_every_run(request):
    """Of all tests that were collected with this one; `make fuzz` is the place of random search."""
    if settings.get_current_profile_name() == "fuzz":
        pytest.skip("a random search was asked for")
    assert settings.default.derandomize
    properties = [item.obj for item in request.session.items if getattr(item.obj, "is_hypothesis_test", False)]
    drawing = [test.__qualname__ for test in properties if not test._hypothesis_internal_use_settings.derandomize]
    assert not drawing, "leave derandomize and database to the profile in tests/conftest.py"
