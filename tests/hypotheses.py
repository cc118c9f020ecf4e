"""How many examples hypothesis draws: as many as the profile says that tests/conftest.py selects, or a share of it."""

import os

from hypothesis import settings

LONG = os.environ.get("PERMASK_HYPOTHESIS") == "long"  # what is too long for every push runs, too


def examples(share):
    """A decorator for a test that is slow for each example: it takes a share of the profile's examples."""
    return settings(max_examples=max(1, round(share * settings.default.max_examples)))
