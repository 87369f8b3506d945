"""Training by our own loop: a step, an epoch, predictions, and `fit`, which can be resumed."""

import copy
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from utils import InputError, files
from utils.devices import autocast, device_name, dtype_name
from utils.optimization import clip_gradients, update_average
from utils.progress import epoch_bar
from utils.results import Results

HEADER = "epoch        lr  train loss  train acc  test loss  test acc  images/s      time"
ROW = (
    "{epoch:5d}  {lr:8.6f}  {train_loss:10.4f}  {train_acc:7.2f} %  {test_loss:9.4f}  "
    "{test_acc:6.2f} %  {images_per_s:8,.0f}  {seconds:6.1f} s"
)


def history_row(epoch, *, lr, train, test, images, seconds, device, dtype):
    """A row of the history: what is known after epoch number `epoch`, from 1, as a dict.

    `lr`: of the last step; `train`, `test`: loss and accuracy in percent; `seconds`: those of
    the training alone, on `device` in `dtype`. Raises InputError where a loss is not finite.
    """
    assert_finite(train[0] + test[0])
    return {
        "epoch": epoch, "lr": lr,
        "train_loss": train[0], "train_acc": train[1], "test_loss": test[0], "test_acc": test[1],
        "images_per_s": images / seconds, "seconds": seconds,
        "device": device_name(device), "precision": dtype_name(dtype),
    }


def table(history):
    """The rows of a history as an aligned table."""
    return "\n".join([HEADER, *(ROW.format(**row) for row in history)])


def begin_table(history, *, images, epochs, dtype, **settings):
    """Prints the table so far, and a line where the run goes on in another precision.

    Returns the `epoch_bar` below which its other lines are to be written.
    """
    bar = epoch_bar(images, epochs, done=len(history), **settings)
    bar.write(table(history))
    before = history[-1]["precision"] if history else dtype_name(dtype)
    if dtype_name(dtype) != before and len(history) < epochs:
        bar.write(f"goes on in {dtype_name(dtype)}; it was {before} so far")
    return bar


def assert_finite(loss):
    """Raises InputError for a loss, a number or a scalar tensor, that is not finite."""
    if not math.isfinite(loss):
        raise InputError(
            "the loss is not finite any more; lower the recipe's max_lr or give more epochs "
            "(the checkpoint of the last whole epoch, where there is one, is kept)"
        )


def loss_and_correct(model, images, labels, recipe):
    """The batch's mean cross-entropy and its number of right answers, both scalar tensors."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    return loss, (logits.argmax(1) == labels).sum()


def training_step(model, images, labels, optimizer, recipe, *, scaler, dtype):
    """One optimizer step. Returns `loss_and_correct`, detached and still on the device.

    `scaler`: a torch.amp.GradScaler, which float16 needs; disabled it does nothing.
    """
    with autocast(images.device, dtype):
        loss, correct = loss_and_correct(model, images, labels, recipe)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if recipe.gradient_clip:
        scaler.unscale_(optimizer)
        clip_gradients(model, recipe)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), correct


def train_epoch(
    model, batches, optimizer, scheduler, recipe, *, scaler, dtype, average=None, bar=None
):
    """One pass over `batches`. Returns the mean loss and the accuracy in percent, both over
    images, and the learning rate of the last step.

    After each step the network `average`, where there is one, moves towards the model. Each batch
    counts by its size, so that a short last batch does not weigh too much. The sums stay on the
    device, which is asked for them at the end alone, so that no step waits for it.
    Raises InputError when the loss is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    sums = torch.zeros(2, device=device)
    count = 0
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        loss, correct = training_step(
            model, images, labels, optimizer, recipe, scaler=scaler, dtype=dtype
        )
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        if average:
            update_average(average, model, recipe.averaging, first=scheduler.last_epoch == 1)
        sums += torch.stack([loss * len(labels), correct])
        count += len(labels)
        if device.type == "cpu":  # where asking costs no wait
            assert_finite(loss)
        if bar is not None:
            bar.update(len(labels))
    loss_sum, correct_sum = sums.tolist()
    assert_finite(loss_sum)
    return loss_sum / count, 100 * correct_sum / count, rate


@torch.inference_mode()
def predict(model, batches, *, classes=(), dtype=None):
    """`Results` of the network on all of `batches`, in their order. Leaves it in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for images, batch_labels in batches:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        with autocast(device, dtype):
            logits.append(model(images).float())
        labels.append(batch_labels)
    return Results(torch.cat(logits).cpu(), torch.cat(labels).cpu(), tuple(classes))


def run_identity(recipe, *, processes=1, **others):
    """What the checkpoints of one run agree in, a dict of plain values.

    Not in device and precision: a run can go on where another one is fast.
    """
    return {"recipe": recipe.settings(), "process count": processes, **others}


def fit(
    model, train_batches, test_batches, optimizer, scheduler, recipe, *, dtype=None,
    checkpoint=None, resume=False, identity=None,
):
    """Trains for `recipe.epochs` epochs and evaluates after each. Returns the history, a list.

    Where the recipe averages weights, the average is evaluated, and is in the model at the end.
    With `checkpoint`, a path, everything is saved there after each epoch, whole or not at all.
    With `resume` a run that was cut off goes on after its last whole epoch; on a CPU it ends
    with the same weights, bit for bit, as one that never was. It may go on in another `dtype`.
    Raises InputError for a checkpoint that is damaged or belongs to another run, where recipe or
    `identity`, a dict of plain values, differ. Each line of the table is printed as soon as it is
    known. Leaves the model in evaluation mode.
    """
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    average = copy.deepcopy(model) if recipe.averaging else None
    if average:
        parts["average"] = average
    identity = run_identity(recipe, **(identity or {}))
    history = []
    if resume and checkpoint and Path(checkpoint).exists():
        history = files.restore_checkpoint(checkpoint, identity, parts, device=device)
    images = len(train_batches.order)
    with begin_table(history, images=images, epochs=recipe.epochs, dtype=dtype) as bar:
        for epoch in range(len(history), recipe.epochs):
            bar.set_description(f"epoch {epoch + 1} of {recipe.epochs}")
            train_batches.set_epoch(epoch)
            start = time.perf_counter()
            *train, rate = train_epoch(
                model, train_batches, optimizer, scheduler, recipe, scaler=scaler, dtype=dtype,
                average=average, bar=bar,
            )
            seconds = time.perf_counter() - start
            test = predict(average or model, test_batches, dtype=dtype)
            history.append(history_row(
                epoch + 1, lr=rate, train=train, test=(test.loss, test.accuracy), images=images,
                seconds=seconds, device=device, dtype=dtype,
            ))
            if checkpoint:
                files.save_checkpoint(checkpoint, identity, history, parts)
            bar.write(ROW.format(**history[-1]))
    if average:
        model.load_state_dict(average.state_dict())
    model.eval()
    return history
