"""Epsilon of Gaussian noise composes exactly."""

import math

import pytest

from fedsplit.guard.gaussian import epsilon, gaussian_precision, largest_precision


def test_without_noise_there_is_no_epsilon() -> None:
    assert gaussian_precision(0.0) == math.inf == epsilon(math.inf, 1e-5)
    assert epsilon(gaussian_precision(1.0) + gaussian_precision(0.0), 1e-5) == math.inf
    assert epsilon(0.0, 1e-5) == 0


@pytest.mark.parametrize("noises", [(8.0,), (4.0, 6.0), (20.0, 5.0, 7.0), (10.0,) * 6])
def test_epsilon_composes_as_dp_accounting_does(noises: tuple[float, ...]) -> None:
    """Each release is a Gaussian of noise multiplier noise/2: replacing a record moves it by twice the clip."""
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    composed = PLDAccountant()
    for noise in noises:
        composed.compose(GaussianDpEvent(noise / 2))
    expected = composed.get_epsilon(1e-5)  # an upper bound, by rounding
    found = epsilon(sum(gaussian_precision(noise) for noise in noises), 1e-5)
    assert expected * 0.998 <= found <= expected * (1 + 1e-9)


@pytest.mark.parametrize("noise", [0.3, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_epsilon_is_that_of_two_opposite_records(noise: float, clip: float) -> None:
    """By the definition: the outputs +clip and -clip, each with noise of deviation ``noise * clip``."""
    away, deviation = 2 * clip, noise * clip
    found = epsilon(gaussian_precision(noise), 1e-5)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta(epsilon: float) -> float:
        middle = epsilon * deviation / away
        return normal(away / deviation / 2 - middle) - math.exp(epsilon) * normal(-away / deviation / 2 - middle)

    assert delta(found * 1.001) < 1e-5 < delta(found * 0.999)


def test_little_noise_has_a_large_epsilon_at_once() -> None:
    """Not after minutes and gigabytes, as by adding up distributions."""
    assert 2e4 < epsilon(gaussian_precision(0.01), 1e-5) < 2.2e4
    assert 0 <= epsilon(gaussian_precision(1e6), 1e-5) < 1e-3


@pytest.mark.parametrize("most", [0.1, 1.0, 8.0, 300.0])
def test_the_largest_precision_has_just_the_epsilon(most: float) -> None:
    assert epsilon(largest_precision(most, 1e-5), 1e-5) == pytest.approx(most, rel=1e-6)
    assert largest_precision(most, 1e-5) < largest_precision(most + 0.01, 1e-5)


def test_without_a_limit_any_precision_will_do() -> None:
    assert largest_precision(None, 1e-5) == math.inf == largest_precision(math.inf, 1e-5)
