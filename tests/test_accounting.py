"""What differentially private training costs: golden figures, the cross-check, and from epsilon back to noise."""

import tracemalloc
from math import exp
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.errors import StudyInvalid
from shared_models.parse import parse
from shared_models.protect.accounting import (
    Spend,
    epsilon,
    epsilon_beside,
    epsilon_bound,
    noise_for,
    steps_within,
)

# noise, sample rate, steps, delta; epsilon of dp-accounting's PLD and RDP and of Opacus 1.6 (security.md, section 4)
GOLDEN = [
    (1.0, 0.04, 1250, 1e-4, 8.39, 9.31),
    (2.0, 0.04, 1250, 1e-4, 2.79, 3.09),
    (1.0, 0.01, 5000, 1e-5, 4.20, 4.59),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "pld", "rdp"), GOLDEN)
def test_epsilon_is_the_golden_one_within_one_and_a_half_percent(noise, rate, steps, delta, pld, rdp):
    spent = [Spend(noise, rate, steps)]
    assert epsilon(spent, delta) == pytest.approx(pld, rel=0.015)
    assert epsilon_bound(spent, delta) == pytest.approx(rdp, rel=0.015)
    assert epsilon(spent, delta) <= epsilon_bound(spent, delta)


def test_one_gaussian_step_without_sampling_is_the_closed_form_of_balle_and_wang_2018_theorem_8():
    found, below = epsilon([Spend(2.0, 1.0, 1)], 1e-5), NormalDist().cdf
    delta = below(0.25 - 2 * found) - exp(found) * below(-0.25 - 2 * found)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_the_order_of_the_work_and_how_it_is_cut_do_not_matter():
    parts = [Spend(2.0, 0.02, 30), Spend(1.5, 0.05, 20), Spend(2.0, 0.02, 70)]
    together = [Spend(1.5, 0.05, 20), Spend(2.0, 0.02, 100)]
    assert epsilon(parts, 1e-5) == epsilon(together, 1e-5)
    assert epsilon([], 1e-5) == epsilon_bound([], 1e-5) == 0.0


def test_a_delta_rarer_than_a_distribution_tells_has_a_figure_and_a_noise_for_it():
    spends = [Spend(1 + n / 10, 0.01, 500) for n in range(5)]
    figures = [epsilon(spends, delta) for delta in (1e-5, 1e-12, 1e-14, 1e-15, 1e-30, 1e-300)]
    assert figures == sorted(figures)
    assert figures[-1] == epsilon_bound(spends, 1e-300) < 1000
    noise = noise_for(2.0, 0.01, 100, 1e-20)
    assert epsilon([Spend(noise, 0.01, 100)], 1e-20) <= 2.0 < epsilon([Spend(0.99 * noise, 0.01, 100)], 1e-20)


@settings(max_examples=5, deadline=None)
@given(st.floats(0.8, 8), st.floats(0.001, 1), st.integers(1, 50))
def test_more_steps_cost_more_and_more_noise_costs_less(noise, rate, steps):
    cost = epsilon_bound([Spend(noise, rate, steps)], 1e-5)
    assert epsilon_bound([Spend(noise, rate, steps + 1)], 1e-5) >= cost
    assert epsilon_bound([Spend(noise * 1.1, rate, steps)], 1e-5) <= cost


@pytest.mark.parametrize("limit", [0.9, 1.1, 3.0])  # times the exact figure: refused, nearly refused, by the bound
def test_a_figure_beside_a_limit_is_above_it_where_the_exact_one_is(limit):
    spends = [Spend(1.1, 0.05, 400)]
    exact = epsilon(spends, 1e-5)
    assert (epsilon_beside(limit * exact, spends, 1e-5) > limit * exact) == (limit < 1)


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.5, 0.001, 100), (0.6, 0.002, 20), (1.0, 0.001, 100)])
def test_few_steps_at_a_low_rate_are_held_against_a_limit_by_the_exact_figure(noise, rate, steps):
    spends = [Spend(noise, rate, steps)]
    exact = epsilon(spends, 1e-4)
    assert epsilon_bound(spends, 1e-4) > 2 * exact
    assert epsilon_beside(1.01 * exact, spends, 1e-4) <= 1.01 * exact


def test_what_is_far_above_a_limit_is_known_without_the_memory_of_the_exact_figure():
    tracemalloc.start()
    assert epsilon_beside(8.0, [Spend(0.3, 0.5, 10**9)], 1e-5) > 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_noise_for_an_epsilon_meets_it_and_a_hundredth_less_does_not():
    noise = noise_for(0.1, 0.1, 4, 1e-5)
    assert epsilon([Spend(noise, 0.1, 4)], 1e-5) <= 0.1
    assert epsilon([Spend(0.99 * noise, 0.1, 4)], 1e-5) > 0.1
    with pytest.raises(ValueError, match="no noise up to 1000"):
        noise_for(1e-4, 1.0, 10**6, 1e-5)


def test_the_steps_that_fit_do_and_twice_as_many_do_not():
    spent = [Spend(8.0, 0.1, 10)]
    fits = steps_within(0.4, spent, Spend(8.0, 0.1, 400), 1e-5)
    assert 0 < fits < 400
    assert epsilon([*spent, Spend(8.0, 0.1, fits)], 1e-5) <= 0.4
    assert epsilon([*spent, Spend(8.0, 0.1, 2 * fits)], 1e-5) > 0.4
    assert steps_within(0.1, spent, Spend(8.0, 0.1, 1), 1e-5) == 0


@pytest.mark.parametrize("spoilt", [{"noise_multiplier": 0.0}, {"sample_rate": 1.1}, {"steps": 0}])
def test_settings_that_no_accountant_can_mean_are_refused(spoilt):
    with pytest.raises(StudyInvalid, match=next(iter(spoilt))):
        parse(Spend, {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1} | spoilt, "spend")
    with pytest.raises(ValueError, match="delta is 1"):
        epsilon([Spend(1.0, 0.1, 1)], 1.0)


def test_noise_is_found_where_much_of_it_costs_nothing_at_all():
    found = noise_for(8.0, 0.2, 50, 1e-3)  # epsilon of 1000 clips is 0 at so large a delta
    assert 7.9 < epsilon([Spend(found, 0.2, 50)], 1e-3) <= 8.0
