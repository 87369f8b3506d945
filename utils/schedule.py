"""The one-cycle learning rate of the assignment, and the range test that finds its limits."""

import contextlib
import io
import warnings
from unittest.mock import patch

import numpy as np
import torch
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import TqdmExperimentalWarning

from utils import InputError
from utils.progress import progress_bar

with warnings.catch_warnings():  # its import announces bars that are not used here
    warnings.simplefilter("ignore", TqdmExperimentalWarning)
    from torch_lr_finder import LRFinder


def one_cycle(
    optimizer, *, total_steps, epochs, peak_epoch, min_lr, max_lr, final_lr=None,
    anneal="linear", cycle_momentum=False,
):
    """The rate rises from `min_lr` to `max_lr` at the end of `peak_epoch`, then falls back.

    The last of `total_steps` steps has `final_lr`; where that is None, `min_lr` again: "no
    annihilation". `anneal`: "linear" both ways, or "cos" for half a cosine wave each.
    With `cycle_momentum` the momentum, Adam's first beta, does the opposite: from 0.95 to 0.85
    and back. Without, it is left alone. Step it once after each optimizer step.
    Source: Smith, "A disciplined approach to neural network hyper-parameters" (2018).
    """
    total_steps = max(total_steps, 3)  # fewer make OneCycleLR divide by zero
    # 5/24 peaks at the end of epoch 5; the usual 0.2 peaks at epoch 4.8. In the shortest of runs
    # one step up and one down are kept.
    share = min(max(peak_epoch / epochs, 2 / total_steps), 1 - 1 / total_steps)
    return OneCycleLR(
        optimizer,
        max_lr=[max_lr * group.get("factor", 1) for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=share,
        anneal_strategy=anneal,
        cycle_momentum=cycle_momentum,
        div_factor=max_lr / min_lr,
        final_div_factor=min_lr / (final_lr or min_lr),
    )


def one_cycle_rates(*, total_steps, **settings):
    """The learning rate of each step, as a list: the schedule without a training run."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = one_cycle(optimizer, total_steps=total_steps, **settings)
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def lr_range_test(
    model, loader, optimizer, *, start_lr=1e-6, end_lr=1.0, steps=100, dtype=None, smoothing=0.2
):
    """Trains for some steps while the rate grows from `start_lr` to `end_lr`, by torch-lr-finder.

    Model and optimizer are put back as they were. Returns (rates, losses, suggestion): two lists,
    the losses smoothed, and the rate where the loss falls fastest on its way to the lowest.
    Stops early where the loss is twice the lowest. `dtype`: of mixed precision, None for float32.
    Source: Smith, "Cyclical learning rates for training neural networks" (2017).
    """
    device = next(model.parameters()).device
    finder = LRFinder(
        model,
        optimizer,
        torch.nn.CrossEntropyLoss(),
        device=device,
        amp_backend="torch",
        amp_config={"device_type": device.type, "dtype": dtype, "enabled": dtype is not None},
        grad_scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    # The library's own bar is a widget in notebooks, and it prints how to draw its own plot.
    with (
        patch("torch_lr_finder.lr_finder.tqdm", progress_bar),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        finder.range_test(
            loader, start_lr=start_lr, end_lr=end_lr, num_iter=steps, smooth_f=smoothing,
            diverge_th=2,
        )
    finder.reset()
    rates, losses = finder.history["lr"], finder.history["loss"]
    finite = np.isfinite(losses)  # the library goes on after a loss that is not a number
    end = len(losses) if finite.all() else int(finite.argmin())
    rates, losses = rates[:end], losses[:end]
    if end < 2:
        raise InputError(f"the loss is not finite at a rate of {start_lr}; start lower")
    before_lowest = losses[: max(int(np.argmin(losses)), 1) + 1]  # after it, noise decides
    return rates, losses, rates[int(np.gradient(before_lowest).argmin())]
