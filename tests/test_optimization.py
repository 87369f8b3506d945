"""The optimizer, the one-cycle schedule at its corners and in between, and the range test."""

import copy
from itertools import accumulate

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from conftest import CPU, Small, assert_same_state, tiny_images
from utils import InputError
from utils.batches import training_batches
from utils.devices import autocast
from utils.models import build
from utils.optimization import (
    lr_range_test,
    make_optimizer,
    one_cycle,
    one_cycle_rates,
    suggested_lr,
)
from utils.recipes import RECIPES, Recipe, recipe

S10 = recipe("s10")
SGD = Recipe(
    name="sgd", optimizer="sgd", min_lr=0.01, max_lr=0.1, weight_decay=0.01, label_smoothing=0.1
)


class Network(nn.Module):
    """A hidden layer and a linear layer that is called as in our networks; logits times `scale`."""

    def __init__(self, scale=1.0, *, inputs=4):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc, self.scale = nn.Linear(inputs, 16), nn.Linear(16, 3), scale

    def forward(self, x):
        return self.scale * self.fc(self.body(x.flatten(1)).relu())


def with_parameter():
    """An Adam with something to do."""
    return torch.optim.Adam([torch.zeros(1, requires_grad=True)], betas=(0.8, 0.99))


def read_groups(optimizer, scheduler, steps, *names):
    """Of each step the values of all groups."""
    rows = []
    for _ in range(steps):
        rows.append([group[name] for group in optimizer.param_groups for name in names])
        optimizer.step()
        scheduler.step()
    return rows


# Optimizer


@pytest.mark.parametrize("name, kind", [
    ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD),
])
def test_settings_of_the_recipe_arrive(name, kind):
    optimizer = make_optimizer(Network(), SGD.replace(optimizer=name, weight_decay=0.25))
    assert type(optimizer) is kind
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.25)
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.9, True)


def test_logit_scale_trains_as_if_the_logits_were_multiplied():
    images, labels = torch.randn(8, 4), torch.randint(0, 3, (8,))
    outer, inner = Network(0.125), Network()
    with torch.no_grad():
        inner.fc.weight *= 0.125
        inner.fc.bias *= 0.125
    plain = SGD.replace(min_lr=0.1, max_lr=1, weight_decay=0)
    for model, settings in ((outer, plain), (inner, plain.replace(logit_scale=0.125))):
        optimizer = make_optimizer(model, settings)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    torch.testing.assert_close(outer(images), inner(images))
    torch.testing.assert_close(outer.body.weight, inner.body.weight)


def test_what_whitens_is_left_as_it_is():
    settings = SGD.replace(whiten=True, width=2)
    model = build(settings, tiny_images())
    first = model.prep[0].weight
    [group] = make_optimizer(model, settings).param_groups
    assert set(group["params"]) == set(model.parameters()) - {first}


def test_rates_of_their_own_follow_the_schedule():
    settings = SGD.replace(epochs=3, peak_epoch=1, logit_scale=0.5)
    model = Network()
    optimizer = make_optimizer(model, settings)
    assert set(optimizer.param_groups[1]["params"]) == set(model.fc.parameters())
    scheduler = one_cycle(optimizer, settings, total_steps=6)
    rates = read_groups(optimizer, scheduler, 6, "lr")
    plain = one_cycle_rates(settings, total_steps=6)
    assert rates == [pytest.approx([rate, rate / 4]) for rate in plain]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_overflow_in_the_first_step_of_float16_leaves_the_weights_finite(name):
    """The step is left out; a fused SGD would go on with a momentum that was never set."""
    model = Network()
    optimizer = make_optimizer(model, SGD.replace(optimizer=name))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    images, labels = 1e6 * torch.randn(8, 4), torch.arange(8) % 3
    before = copy.deepcopy(model)
    torch.use_deterministic_algorithms(True)  # fills memory that is not set with NaN
    try:
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(images), labels)).backward()
            scaler.step(optimizer)
            if scaler.get_scale() == 2.0**126:
                assert_same_state(model, before)
            scaler.update(1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.fc.weight, before.fc.weight), "no step was made"


# One cycle


@pytest.mark.parametrize("epochs, peak_epoch", [(24, 5), (20, 5), (12, 2.5), (5, 1), (1, 0.5)])
@pytest.mark.parametrize("steps", [98, 40])
def test_straight_to_the_peak_and_back(epochs, peak_epoch, steps):
    total, up = epochs * steps, int(peak_epoch * steps)
    settings = S10.replace(epochs=epochs, peak_epoch=peak_epoch)
    rates = one_cycle_rates(settings, total_steps=total)
    assert rates.index(max(rates)) == up - 1
    expected = [*np.linspace(1e-4, 1e-2, up), *np.linspace(1e-2, 1e-4, total - up + 1)[1:]]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("anneal, share", [
    ("linear", lambda x: x), ("cos", lambda x: (1 - np.cos(np.pi * x)) / 2),
])
def test_either_form_and_an_end_of_its_own(anneal, share):
    low, high, end = 4e-4, 1e-2, 4e-8
    settings = S10.replace(
        epochs=10, peak_epoch=3, min_lr=low, max_lr=high, final_lr=end, anneal=anneal
    )
    rates = one_cycle_rates(settings, total_steps=200)
    up, down = share(np.linspace(0, 1, 60)), share(np.linspace(0, 1, 141)[1:])
    expected = [*(low + (high - low) * up), *(high + (end - high) * down)]
    assert rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name, epochs", [("s10", 24), ("s10", 12), ("s10", 48), ("s10_20", 20)])
def test_scaled_recipes_keep_the_peak_at_the_same_fraction(name, epochs):
    original = recipe(name)
    steps = 96 * epochs
    rates = one_cycle_rates(original.scaled(epochs=epochs), total_steps=steps)
    assert rates.index(max(rates)) == original.peak_epoch / original.epochs * steps - 1
    assert max(rates) == pytest.approx(original.max_lr, rel=1e-12)
    assert rates[-1] == pytest.approx(original.min_lr, rel=1e-12)


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    steps=st.integers(1, 200),
    epochs=st.integers(2, 30),
    fraction=st.floats(0.05, 0.9),
    low=st.floats(1e-6, 1e-3),
    factor=st.floats(1.5, 1000),
)
def test_up_then_down_within_the_limits(steps, epochs, fraction, low, factor):
    total, high = steps * epochs, low * factor
    settings = S10.replace(epochs=epochs, peak_epoch=fraction * epochs, min_lr=low, max_lr=high)
    rates = one_cycle_rates(settings, total_steps=total)
    assert all(low * (1 - 1e-9) <= rate <= high * (1 + 1e-9) for rate in rates)
    peak = rates.index(max(rates))
    assert abs(peak - max(fraction * total - 1, 1)) <= 1
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
    assert rates[0] == pytest.approx(low, rel=1e-9)
    if peak < total - 1:
        assert rates[-1] == pytest.approx(low, rel=1e-9)


@pytest.mark.parametrize("epochs", [1, 2, 4, 24])
@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_very_short_runs(total, epochs):
    rates = one_cycle_rates(S10.scaled(epochs=epochs), total_steps=total)
    assert len(rates) == total
    assert rates[0] == pytest.approx(1e-4)
    assert total == 1 or rates[1] == pytest.approx(1e-2)
    assert total < 3 or rates[-1] == pytest.approx(1e-4)


def test_momentum_is_left_alone():
    optimizer = with_parameter()
    scheduler = one_cycle(optimizer, S10, total_steps=10)
    assert read_groups(optimizer, scheduler, 10, "betas") == [[(0.8, 0.99)]] * 10


def test_momentum_cycles_where_that_is_wanted():
    optimizer = with_parameter()
    settings = S10.replace(epochs=9, peak_epoch=5, cycle_momentum=True)
    scheduler = one_cycle(optimizer, settings, total_steps=9)
    momenta = [0.95, 0.925, 0.9, 0.875, 0.85, 0.875, 0.9, 0.925, 0.95]
    assert read_groups(optimizer, scheduler, 9, "betas") == [
        [(pytest.approx(momentum), 0.99)] for momentum in momenta
    ]


@pytest.mark.parametrize("name, highest, settings", [
    ("s10", 5.21e-4, {"pct_start": 0.2, "div_factor": 100, "final_div_factor": 100}),
    ("s10_20", 0.017, {"pct_start": 5 / 24, "div_factor": 10, "final_div_factor": 1}),
    ("s10_albumentations", 0.0438, {
        "pct_start": 0.2, "div_factor": 100, "final_div_factor": 1e4, "anneal_strategy": "linear",
    }),
    ("resnet9", 0.01, {}),  # torch's defaults
])
def test_published_schedules_are_those_of_their_sources(name, highest, settings):
    ours, torchs = with_parameter(), with_parameter()
    source = recipe(f"{name}_published")
    first = read_groups(ours, one_cycle(ours, source, total_steps=1000), 1000, "lr", "betas")
    schedule = OneCycleLR(torchs, highest, total_steps=1000, **settings)
    second = read_groups(torchs, schedule, 1000, "lr", "betas")
    for (rate, betas), (expected, expected_betas) in zip(first, second, strict=True):
        assert rate == pytest.approx(expected, rel=1e-9)
        assert betas == pytest.approx(expected_betas, rel=1e-9)


# Range test


def make_task(settings=S10, *, outlier=None):
    """A small model, an optimizer with some state, and batches of pictures that it can learn."""
    model = Network(inputs=27)
    torch.manual_seed(1)
    images = torch.randn(48, 3, 3, 3)
    labels = images.flatten(1)[:, :3].argmax(1)
    optimizer = make_optimizer(model, settings)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    if outlier is not None:
        images[outlier] = float("inf")
    return model, DataLoader(TensorDataset(images, labels), batch_size=8), optimizer


def test_range_test_goes_from_start_to_end():
    model, batches, optimizer = make_task()
    found = lr_range_test(
        model, batches, optimizer, S10, start_lr=1e-5, end_lr=10**-0.5, steps=46
    )
    assert list(found["lr"]) == pytest.approx([1e-5 * 10 ** (i / 10) for i in range(46)])
    losses = found["smoothed"]
    assert losses.min() < 0.9 * losses[0], "the model learns nothing"


def test_suggestion_is_the_steepest_fall_before_the_lowest():
    losses = [5.0, 4.9, 4.0, 3.9, 3.5, 9.0, 2.0 + 6.9, 3.6]
    table = pd.DataFrame({"lr": range(1, 9), "smoothed": losses})
    assert suggested_lr(table) == 3  # from 4.9 to 3.9 in two steps
    assert suggested_lr(table[:2]) in (1, 2)


@pytest.mark.parametrize("changes", [
    {"logit_scale": 0.5}, {"label_smoothing": 0.3}, {"gradient_clip": 0.01},
    {"logit_scale": 0.5, "label_smoothing": 0.3, "gradient_clip": 0.01},
], ids=str)
@pytest.mark.parametrize("dtype, rel", [(None, 1e-5), (torch.float16, 2e-3)], ids=str)
def test_range_test_trains_as_the_recipe_says(changes, dtype, rel):
    """Unsmoothed its losses are those of a loop by hand, to the last of the steps."""
    settings = SGD.replace(**changes)
    model, batches, optimizer = make_task(settings)
    expected, (by_hand, _, stepper) = [], make_task(settings)
    rates = [0.01 * 10 ** (i / 9) for i in range(10)]
    for rate, (images, labels) in zip(rates, [*batches, *batches], strict=False):
        stepper.zero_grad()
        with autocast(CPU, dtype):
            logits = by_hand(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        loss.backward()
        for parameter in by_hand.parameters():
            if settings.gradient_clip:
                parameter.grad.clamp_(-settings.gradient_clip, settings.gradient_clip)
        stepper.param_groups[0]["lr"] = rate
        if settings.logit_scale != 1:
            stepper.param_groups[1]["lr"] = rate * settings.logit_scale**2
        stepper.step()
        expected.append(loss.item())
    found = lr_range_test(
        model, batches, optimizer, settings, start_lr=0.01, end_lr=0.1, steps=10, dtype=dtype
    )
    assert list(found["lr"]) == pytest.approx(rates)
    assert list(found["loss"]) == pytest.approx(expected, rel=rel)
    smoothed = accumulate(expected, lambda mean, loss: 0.2 * loss + 0.8 * mean)
    assert list(found["smoothed"]) == pytest.approx(list(smoothed), rel=rel)


@pytest.mark.parametrize("name", RECIPES)
def test_after_a_range_test_all_is_as_if_there_had_been_none(name, capsys):
    """Model and optimizer; the next step is neither clipped nor at another rate; no prints."""
    settings = recipe(name)
    model, batches, optimizer = make_task(settings)
    other, _, untouched = make_task(settings)
    state = copy.deepcopy(optimizer.state_dict())
    lr_range_test(model, batches, optimizer, settings, steps=20)
    assert capsys.readouterr().out == ""
    assert_same_state(model, other)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    images, labels = next(iter(batches))
    for network, own in ((model, optimizer), (other, untouched)):
        own.zero_grad()
        (100 * F.cross_entropy(network(images), labels)).backward()
        for group in own.param_groups:
            group["lr"] = 0.5
        own.step()
    assert_same_state(model, other)
    one_cycle(optimizer, settings, total_steps=10)


def test_range_test_stops_where_the_loss_is_twice_the_lowest():
    model, batches, optimizer = make_task()
    found = lr_range_test(model, batches, optimizer, S10, start_lr=1e-3, end_lr=1e3, steps=200)
    doubled = found["smoothed"] > 2 * found["smoothed"].cummin()
    assert 1 < len(found) < 200
    assert doubled.tolist() == [False] * (len(found) - 1) + [True]


def test_range_test_that_is_interrupted_puts_everything_back():
    clipped = S10.replace(gradient_clip=0.01)
    model, batches, optimizer = make_task(clipped)
    other, *_ = make_task(clipped)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lr_range_test(model, batches, optimizer, clipped, steps=20)
    assert_same_state(model, other)
    hook.remove()
    (parameter, *_) = model.parameters()
    for each in model.parameters():
        each.grad = torch.full_like(each, 100.0)
    optimizer.step()
    assert (parameter.grad == 100).all()  # nothing clips any more


def test_range_test_takes_the_batches_of_a_recipe():
    """More steps than an epoch has, and in the second one other orders and draws."""
    settings = SGD.replace(batch_size=16, cutout=2)
    model = Small(3)
    batches = training_batches(settings, tiny_images(), device=CPU)
    optimizer = make_optimizer(model, settings)
    drawn, augment = [], batches.augment
    batches.augment = lambda *given: drawn.append(augment(*given)) or drawn[-1]
    found = lr_range_test(model, batches, optimizer, settings, end_lr=1e-3, steps=5)
    assert len(found) == 5 > len(batches)
    assert len({each.sum().item() for each in drawn}) == len(drawn) > len(batches)


def test_range_test_keeps_only_finite_losses():
    """One batch that is not finite spoils the weights, and with them all losses that follow."""
    model, batches, optimizer = make_task(outlier=3 * 8)
    found = lr_range_test(model, batches, optimizer, S10, start_lr=1e-4, end_lr=1e-2, steps=5)
    assert list(found["lr"]) == pytest.approx([1e-4, 10**-3.5, 1e-3])
    assert np.isfinite(found).all(axis=None)
    assert all(p.isfinite().all() for p in model.parameters())


def test_range_test_that_starts_too_high():
    model, batches, optimizer = make_task(SGD)
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match="start lower"):
        lr_range_test(model, batches, optimizer, SGD, start_lr=1e38, end_lr=1e38, steps=5)
    assert_same_state(model, before)
