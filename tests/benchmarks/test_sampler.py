import numpy as np
import pytest

from benchmarks.sampler import _difference


def test_the_error_of_a_difference_is_that_of_pairs() -> None:
    """Clips of the same noise come out right together: that much less is left to chance."""
    generator = np.random.default_rng(0)
    one = generator.random(400) < 0.9
    other = one ^ (generator.random(400) < 0.02)
    found = _difference(other, one)
    assert found["change"] == pytest.approx(other.mean() - one.mean())
    apart = (2 * 0.9 * 0.1 / 400) ** 0.5
    assert 0 < found["standard_error"] < apart / 2
    assert _difference(one, one) == {"change": 0.0, "standard_error": 0.0}
