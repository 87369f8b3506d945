"""The optimizer, the one-cycle learning rate, and the range test that finds its limits."""

import contextlib
import io
import itertools
import warnings

import numpy as np
import pandas as pd
import torch
from torch.optim.lr_scheduler import OneCycleLR

from utils import InputError
from utils.progress import progress_bar

with warnings.catch_warnings():  # its import announces bars that are not used here
    warnings.simplefilter("ignore")
    from torch_lr_finder import LRFinder, TrainDataLoaderIter, lr_finder


def make_optimizer(model, recipe):
    """The recipe's optimizer, at the rate where its schedule starts.

    With `logit_scale` s the linear layer is in a group of its own, with the "factor" s² for its
    rate. Under SGD, but for decay and the first bias, this is training with the logits times s: for
    weights w·s the gradient is s times as large, and a step of w moves the logits s times as far.
    What is fixed is in no group.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        factor = recipe.logit_scale**2 if name.startswith("fc.") else 1.0
        if parameter.requires_grad:
            groups.setdefault(factor, []).append(parameter)
    parameters = [
        {"params": members, "lr": recipe.min_lr * factor, "factor": factor}
        for factor, members in groups.items()
    ]
    # fused: in float16 all others wait in each step for the device to say whether it overflowed
    settings = {"weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **settings)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # By itself it would never be set where float16 overflows in the first step.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    adam = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return adam(parameters, **settings)


def one_cycle(optimizer, recipe, *, total_steps):
    """The rate rises from `min_lr` to `max_lr` at the end of `peak_epoch`, then falls.

    The last of `total_steps` steps has `final_lr`; where that is None, `min_lr` again: "no
    annihilation". With `cycle_momentum` the momentum does the opposite; without, it is left
    alone. Step it once after each optimizer step.
    Source: Smith, "A disciplined approach to neural network hyper-parameters" (2018).
    """
    total_steps = max(total_steps, 3)  # fewer make OneCycleLR divide by zero
    # 5/24 peaks at the end of epoch 5; the usual 0.2 peaks at epoch 4.8. In the shortest of runs
    # one step up and one down are kept.
    share = min(max(recipe.peak_epoch / recipe.epochs, 2 / total_steps), 1 - 1 / total_steps)
    return OneCycleLR(
        optimizer,
        max_lr=[recipe.max_lr * group.get("factor", 1) for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=share,
        anneal_strategy=recipe.anneal,
        cycle_momentum=recipe.cycle_momentum,
        div_factor=recipe.max_lr / recipe.min_lr,
        final_div_factor=recipe.min_lr / (recipe.final_lr or recipe.min_lr),
    )


def one_cycle_rates(recipe, *, total_steps):
    """The learning rate of each step, as a list: the schedule without a training run."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = one_cycle(optimizer, recipe, total_steps=total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@torch.no_grad()
def update_average(average, model, share, *, first):
    """Has the network `average` keep that `share` of itself, and take the rest from `model`.

    That is weights and running statistics; in the `first` step of all it takes everything.
    Without waiting for the device, which torch's AveragedModel does twice. Statistics computed anew
    for the averaged weights would cost a pass over the training images. At the end of a run of
    s10_best (a quarter of the channels, 10,000 images, 8 epochs) they gave the same accuracy, 79.35
    instead of 79.60 % of 2,000, and a lower loss, 0.69 instead of 0.79.
    """
    if first:
        average.load_state_dict(model.state_dict())
    ours, theirs = (
        [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
        for network in (average, model)
    )
    torch._foreach_lerp_(ours, theirs, 1 - share)


SMOOTHING = 0.2  # weight of the newest loss in a range test's running mean


def lr_range_test(
    model, batches, optimizer, recipe, *, start_lr=1e-6, end_lr=1.0, steps=100, dtype=None
):
    """Trains for some steps while the rate grows from `start_lr` to `end_lr`, by torch-lr-finder.

    With the recipe's label smoothing, clipping and factors of rates. Model and optimizer are put
    back as they were. Returns a DataFrame with `lr`, `loss` and `smoothed`, its running mean, of
    each step. Stops early where that is twice the lowest. `dtype`: of mixed precision, None for
    float32. Raises InputError where the loss is not finite from the start.
    Source: Smith, "Cyclical learning rates for training neural networks" (2017).
    """
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    finder = LRFinder(
        model,
        optimizer,
        torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
        device=device,
        amp_backend="torch",
        amp_config={"device_type": device.type, "dtype": dtype, "enabled": dtype is not None},
        grad_scaler=scaler,
    )

    def before_step(*_):  # the library knows one rate, and no clipping
        for group in optimizer.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"] * group.get("factor", 1)
        clip_gradients(model, recipe, scale=scaler.get_scale())

    lr_finder.tqdm = progress_bar  # its own is a widget in notebooks
    hook = optimizer.register_step_pre_hook(before_step)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to draw its own plot
            finder.range_test(
                TrainDataLoaderIter(_all_epochs(batches)), start_lr=start_lr, end_lr=end_lr,
                num_iter=steps, smooth_f=SMOOTHING, diverge_th=2,
            )
    finally:
        hook.remove()
        finder.reset()
    found = pd.DataFrame(finder.history).rename(columns={"loss": "smoothed"})
    # the library goes on after one that is not finite
    found = found[np.isfinite(found["smoothed"]).cummin()]
    if len(found) < 2:
        raise InputError(f"the loss is not finite at a rate of {start_lr}; start lower")
    smoothed = found["smoothed"]
    newest = (smoothed - (1 - SMOOTHING) * smoothed.shift()) / SMOOTHING
    loss = newest.fillna(smoothed)  # the first
    return found.assign(loss=loss)[["lr", "loss", "smoothed"]]


def _all_epochs(batches):
    """Epoch after epoch of `batches`, each with an order and draws of its own."""
    for epoch in itertools.count():
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        yield from batches


def suggested_lr(found):
    """Where the smoothed loss of a range test falls fastest on its way to the lowest."""
    losses = found["smoothed"].to_numpy()
    before_lowest = losses[: max(losses.argmin(), 1) + 1]  # after it, noise decides
    return found["lr"][np.gradient(before_lowest).argmin()]


def clip_gradients(model, recipe, *, scale=1.0):
    """Where the recipe says so, brings each gradient's element to its largest value.

    `scale`: by which all gradients are too large, of float16.
    """
    if recipe.gradient_clip:
        torch.nn.utils.clip_grad_value_(model.parameters(), scale * recipe.gradient_clip)
