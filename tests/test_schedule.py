"""The one-cycle schedule at its corners and in between, and the learning rate range test."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from utils import InputError
from utils.recipes import recipe
from utils.schedule import lr_range_test, one_cycle, one_cycle_rates

LIMITS = {"min_lr": 1e-4, "max_lr": 1e-2}


@pytest.mark.parametrize("epochs, peak_epoch", [(24, 5), (20, 5), (12, 2.5), (5, 1), (1, 0.5)])
@pytest.mark.parametrize("steps", [98, 40])
def test_straight_to_the_peak_and_back(epochs, peak_epoch, steps):
    total, up = epochs * steps, int(peak_epoch * steps)
    rates = one_cycle_rates(total_steps=total, epochs=epochs, peak_epoch=peak_epoch, **LIMITS)
    assert rates.index(max(rates)) == up - 1
    expected = [*np.linspace(1e-4, 1e-2, up), *np.linspace(1e-2, 1e-4, total - up + 1)[1:]]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("anneal, share", [
    ("linear", lambda x: x), ("cos", lambda x: (1 - np.cos(np.pi * x)) / 2),
])
def test_either_form_and_an_end_of_its_own(anneal, share):
    low, high, end = 4e-4, 1e-2, 4e-8
    rates = one_cycle_rates(
        total_steps=200, epochs=10, peak_epoch=3, min_lr=low, max_lr=high, final_lr=end,
        anneal=anneal,
    )
    up, down = share(np.linspace(0, 1, 60)), share(np.linspace(0, 1, 141)[1:])
    expected = [*(low + (high - low) * up), *(high + (end - high) * down)]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name, epochs", [("s10", 24), ("s10", 12), ("s10", 48), ("s10_20", 20)])
def test_scaled_recipes_keep_the_peak_at_the_same_fraction(name, epochs):
    original = recipe(name)
    scaled = original.scaled(epochs=epochs)
    steps = 96
    rates = one_cycle_rates(total_steps=epochs * steps, **scaled.rates())
    assert rates.index(max(rates)) == original.peak_epoch / original.epochs * epochs * steps - 1
    assert max(rates) == pytest.approx(original.max_lr, rel=1e-12)
    assert rates[-1] == pytest.approx(original.min_lr, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 200),
    epochs=st.integers(2, 30),
    fraction=st.floats(0.05, 0.9),
    low=st.floats(1e-6, 1e-3),
    factor=st.floats(1.5, 1000),
)
def test_up_then_down_within_the_limits(steps, epochs, fraction, low, factor):
    total, high = steps * epochs, low * factor
    rates = one_cycle_rates(
        total_steps=total, epochs=epochs, peak_epoch=fraction * epochs, min_lr=low, max_lr=high
    )
    assert all(low * (1 - 1e-9) <= rate <= high * (1 + 1e-9) for rate in rates)
    peak = rates.index(max(rates))
    assert abs(peak - max(fraction * total - 1, 1)) <= 1
    steps_up = [b - a for a, b in zip(rates[:peak], rates[1 : peak + 1], strict=True)]
    steps_down = [b - a for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False)]
    assert all(step > 0 for step in steps_up)
    assert all(step < 0 for step in steps_down)
    assert rates[0] == pytest.approx(low, rel=1e-9)
    if peak < total - 1:
        assert rates[-1] == pytest.approx(low, rel=1e-9)


@pytest.mark.parametrize("epochs", [1, 2, 4, 24])
@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_very_short_runs(total, epochs):
    rates = one_cycle_rates(total_steps=total, epochs=epochs, peak_epoch=epochs * 5 / 24, **LIMITS)
    assert len(rates) == total
    assert rates[0] == pytest.approx(1e-4)
    assert total == 1 or rates[1] == pytest.approx(1e-2)
    assert total < 3 or rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("epochs", [4, 5, 6])
def test_a_peak_at_or_after_the_end(epochs):
    """As `replace(recipe, epochs=5)` gives it, which forgets to move the peak."""
    rates = one_cycle_rates(total_steps=10 * epochs, epochs=epochs, peak_epoch=5, **LIMITS)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-4)


def test_momentum_is_left_alone():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0.8, 0.99))
    scheduler = one_cycle(optimizer, total_steps=10, epochs=1, peak_epoch=0.5, **LIMITS)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


def test_momentum_cycles_where_that_is_wanted():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0.8, 0.99))
    scheduler = one_cycle(
        optimizer, total_steps=9, epochs=9, peak_epoch=5, **LIMITS, cycle_momentum=True
    )
    betas = []
    for _ in range(9):
        betas.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        scheduler.step()
    momenta = [0.95, 0.925, 0.9, 0.875, 0.85, 0.875, 0.9, 0.925, 0.95]
    assert betas == [(pytest.approx(momentum), 0.99) for momentum in momenta]


def test_resnet9_as_published_has_torchs_defaults():
    groups = []
    for make in (
        lambda adam: one_cycle(adam, total_steps=1000, **recipe("resnet9").as_published().rates()),
        lambda adam: OneCycleLR(adam, 0.01, epochs=8, steps_per_epoch=125),
    ):
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        scheduler = make(optimizer)
        steps = []
        for _ in range(1000):
            steps.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
            optimizer.step()
            scheduler.step()
        groups.append(np.array(steps))
    np.testing.assert_allclose(*groups, rtol=1e-9)


def _task(batch_norm=True):
    """A small model, an optimizer with some state, and a loader of pictures it can learn."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(27, 16)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(16))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    images = torch.randn(48, 3, 3, 3)
    labels = images.flatten(1)[:, :3].argmax(1)
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return model, loader, optimizer


def _same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second


def test_range_test_puts_everything_back(capsys):
    model, loader, optimizer = _task()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    lr_range_test(model, loader, optimizer, steps=20)
    assert _same(before[0], model.state_dict())
    assert _same(before[1], optimizer.state_dict())
    assert capsys.readouterr().out == ""
    one_cycle(optimizer, total_steps=10, epochs=1, peak_epoch=0.5, **LIMITS)


def test_range_test_goes_from_start_to_end():
    model, loader, optimizer = _task()
    rates, losses, suggestion = lr_range_test(
        model, loader, optimizer, start_lr=1e-5, end_lr=1.0, steps=51
    )
    assert rates == pytest.approx([1e-5 * 10 ** (i / 10) for i in range(51)])
    assert len(losses) == 51
    assert rates[0] < suggestion < rates[-1] and suggestion in rates
    assert min(losses) < 0.9 * losses[0], "the model learns nothing"


def test_range_test_keeps_only_finite_losses():
    """One batch that is not finite spoils the weights, and with them all losses that follow."""
    model, loader, optimizer = _task(batch_norm=False)
    loader.dataset.tensors[0][3 * 8] = float("inf")
    rates, losses, suggestion = lr_range_test(
        model, loader, optimizer, start_lr=1e-4, end_lr=1e-2, steps=5
    )
    assert rates == pytest.approx([1e-4, 10**-3.5, 1e-3])
    assert len(losses) == 3 and np.isfinite(losses).all() and suggestion in rates
    assert all(p.isfinite().all() for p in model.parameters())


def test_range_test_that_starts_too_high():
    model, loader, _ = _task(batch_norm=False)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(InputError, match="start lower"):
        lr_range_test(model, loader, optimizer, start_lr=1e38, end_lr=1e38, steps=5)
    assert _same(before, model.state_dict())
