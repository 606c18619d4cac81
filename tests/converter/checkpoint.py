"""A checkpoint that cannot be loaded, and what is said of it."""

import pytest

from converter.checkpoints import load_any
from converter.errors import StiefelError


def refusal(path, **options) -> str:
    with pytest.raises(StiefelError) as caught:
        load_any(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)
