"""Gaps between kernels: by hand, and what they are worth."""

import pytest

from lragent_jax.measure.device_trace import Gap, Kernel, around_longest_gap, busiest_program, gaps, idle_shares


def kernel(start: float, stop: float, program: str = "decode") -> Kernel:
    return Kernel(start, stop, f"k{start}", program)


def test_kernels_that_overlap_leave_no_gap():
    streams = [kernel(0, 50), kernel(10, 20), kernel(40, 60), kernel(70, 80), kernel(80, 90), kernel(95, 96)]
    assert gaps(streams) == gaps(streams[::-1]) == [Gap(60, 70), Gap(90, 95)]
    assert gaps([]) == []


def test_the_longest_gaps_are_those_between_steps():
    # Four steps of three kernels: 1 ns between kernels, 10, 20 and 30 ns between steps.
    starts = (0, 13 + 10, 46 + 10, 89 + 10)
    kernels = [kernel(start + at, start + at + 3) for start in starts for at in (0, 4, 8)]
    shares = idle_shares(kernels, 4, untraced_ms=20e-6)
    window = 99 + 11
    between = (23 - 11) + (56 - 34) + (99 - 67)
    assert shares["between_steps"] == pytest.approx(between / window)
    assert shares["idle"] == pytest.approx((between + 8) / window)
    assert shares["kernels_per_step"] == 3
    assert shares["ms_per_step"] == pytest.approx(window / 4 * 1e-6)
    assert shares["longest_gap_us"] == pytest.approx(0.032)
    assert shares["busy_ms_per_step"] == pytest.approx(9e-6)
    assert shares["idle_untraced"] == pytest.approx(1 - 9 / 20)
    assert idle_shares(kernels, 4, untraced_ms=8e-6)["idle_untraced"] == 0.0, "kernels are slower while traced"


def test_what_is_drawn_lies_around_the_longest_gap():
    kernels = [kernel(0, 1000), kernel(1500, 2000), kernel(9000, 9500), kernel(400_000, 400_001)]
    assert [start for start, _, _ in around_longest_gap(kernels[:3], microseconds=1)] == [-0.5]
    assert around_longest_gap([kernel(0, 1), kernel(1, 2)]) == []


def test_the_program_that_ran_longest():
    mixed = [kernel(0, 5, "prefill"), kernel(5, 8), kernel(8, 11), kernel(11, 12, "")]
    assert busiest_program(mixed) == mixed[1:3]
    assert busiest_program([]) == []
