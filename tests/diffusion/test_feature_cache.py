"""Which steps reuse follows from a measured curve, a threshold, and nothing else."""

import numpy as np
import pytest

from sora_jax.diffusion.feature_cache import MAX_REUSED, ChangeCurve, computed_steps, measured
from sora_jax.diffusion.times import sampling_times

STRAIGHT = ChangeCurve(times=(1.0, 0.0), change=(0.0, 1.0))


def computed(curve, steps, threshold, fresh=(0,), shift=1.0):
    marked = np.isin(np.arange(steps), fresh)
    times = sampling_times(steps, shift=shift)[:-1]
    return computed_steps(curve, times, threshold=threshold, fresh=marked)


def random_curve(seed):
    rng = np.random.default_rng(seed)
    change = np.concatenate([[0.0], np.cumsum(rng.exponential(0.05, 20))])
    return ChangeCurve(times=np.linspace(1, 0.1, 21).tolist(), change=change.tolist())


def test_change_is_linear_between_and_goes_on_beyond_the_last():
    curve = ChangeCurve(times=(0.9, 0.5, 0.3), change=(0.0, 0.2, 0.6))
    np.testing.assert_allclose(
        curve.at(np.array([1.0, 0.9, 0.7, 0.5, 0.4, 0.3, 0.1])), [0, 0, 0.1, 0.2, 0.4, 0.6, 1.0]
    )


def test_a_straight_change_is_followed_by_hand():
    # A step of ten moves by .1: two of them stay below .25, a third does not.
    expected = [True, False, False, True, False, False, True, False, False, True]
    np.testing.assert_array_equal(computed(STRAIGHT, 10, 0.25), expected)


def test_without_a_threshold_or_below_every_change_all_is_computed():
    for threshold in (0.0, 1e-6):
        assert computed(random_curve(0), 24, threshold, shift=5.0).all()


def test_fewer_steps_are_computed_as_the_threshold_grows():
    for seed in range(20):
        counts = [
            computed(random_curve(seed), 30, threshold, shift=3.0).sum()
            for threshold in np.linspace(0, 0.5, 40)
        ]
        assert counts[0] == 30 and counts[-1] < 15
        assert np.all(np.diff(counts) <= 0)


def test_no_residual_is_reused_for_too_long():
    flat = ChangeCurve(times=(1.0, 0.0), change=(0.0, 0.0))
    marks = computed(flat, 3 * (MAX_REUSED + 1), 0.1)
    np.testing.assert_array_equal(np.flatnonzero(marks), [0, MAX_REUSED + 1, 2 * MAX_REUSED + 2])


def test_fresh_steps_are_computed_and_what_follows_counts_from_them():
    expected = [0, 2, 5, 8]
    np.testing.assert_array_equal(
        np.flatnonzero(computed(STRAIGHT, 10, 0.25, fresh=(0, 2))), expected
    )


def test_the_same_curve_serves_another_number_of_steps():
    """Where every step is short, what is computed depends on the change alone."""
    curve = ChangeCurve(times=(1.0, 0.5, 0.0), change=(0.0, 0.2, 1.0))
    for steps in (200, 400):
        times = sampling_times(steps)[:-1][computed(curve, steps, 0.009, shift=1.0)]
        late = times[times < 0.5]
        np.testing.assert_allclose(-np.diff(late), 0.009 / 1.6, atol=1 / steps)


def test_a_measured_curve_adds_up_the_mean_of_its_rows():
    curve = measured(np.array([1.0, 0.6, 0.2]), np.array([[0, 0.1, 0.3], [0, 0.3, 0.1]]))
    assert curve == ChangeCurve(times=(1.0, 0.6, 0.2), change=(0.0, 0.2, 0.4))


@pytest.mark.parametrize(
    ("times", "change", "words"),
    [
        ((0.5, 0.9), (0.0, 1.0), "must fall"),
        ((0.9,), (0.0,), "two or more"),
        ((0.9, 0.5), (0.0, 1.0, 2.0), "as many"),
        ((1.1, 0.5), (0.0, 1.0), "within"),
        ((0.9, 0.5), (0.1, 1.0), "begin with 0"),
        ((0.9, 0.5, 0.2), (0.0, 1.0, 0.5), "never fall"),
        ((0.9, 0.5), (0.0, float("nan")), "never fall"),
    ],
)
def test_what_is_no_curve_is_refused(times, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        ChangeCurve(times=times, change=change)
    assert "\n" not in str(caught.value)
