"""Training: one step, one epoch, evaluation, and `fit`, which can be cut off and resumed."""

import csv
import json
import math
import os
import platform
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from utils import InputError
from utils.data import make_loader
from utils.progress import progress_bar
from utils.transforms import BatchTransform, albumentations_pipeline, channel_statistics


def pick_device(name=None):
    """The named torch.device, or the machine's accelerator, or else its CPU.

    Raises InputError where this machine does not have it.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # by the kind of device
        raise InputError(f"no device {name!r} on this machine; try --device cpu") from error
    return torch.device(name)


def amp_dtype(device):
    """The dtype of mixed precision that pays on the device; None: float32 only.

    bfloat16 on GPUs and CPUs with instructions for it, float16 on older GPUs with tensor cores.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):  # float16 without tensor cores
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
        return torch.bfloat16 if native else None
    return None


def device_name(device):
    """What the machine calls the device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()
        name = abilities.get("cpu_name") or platform.processor() or platform.machine()
        return f"{name} CPU, {torch.get_num_threads()} thread(s)"
    return str(device)


def autocast(device, dtype):
    """Mixed precision in `dtype`, or none where that is None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def make_optimizer(model, recipe):
    """The recipe's optimizer, at the rate where its schedule starts.

    With `logit_scale` s the linear layer is in a group of its own, with the "factor" s² for its
    rate. Under SGD, but for decay, this is training with the logits times s: for weights w·s the
    gradient is s times as large, and a step of w moves the logits s times as far.
    """
    optimizers = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    }
    groups = {1.0: []}
    for name, parameter in model.named_parameters():
        factor = recipe.logit_scale**2 if name.startswith("fc.") else 1.0
        groups.setdefault(factor, []).append(parameter)
    return optimizers[recipe.optimizer](
        [
            {"params": parameters, "lr": recipe.min_lr * factor, "factor": factor}
            for factor, parameters in groups.items()
        ],
        lr=recipe.min_lr, weight_decay=recipe.weight_decay,
        fused=not recipe.gradient_clip,  # Lightning's mixed precision refuses to clip for these
    )


def make_transforms(recipe, images):
    """The recipe's transform of the training images of an `ImageData`, and that of the others."""
    mean, std = channel_statistics(images.train_images)
    settings = {
        name: getattr(recipe, name)
        for name in ("padding", "padding_mode", "flip", "rotation", "brightness", "cutout")
    }
    if recipe.per_image:
        size = images.train_images.shape[-2:]
        augment = albumentations_pipeline(mean, std, size=size, **settings)
    else:
        sizes = [recipe.size(epoch) for epoch in range(recipe.epochs)] if recipe.sizes else ()
        augment = BatchTransform(mean, std, **settings, sizes=sizes)
    return augment, BatchTransform(mean, std, augment=False)


def make_loaders(recipe, images, *, seed=0, device, workers=None):
    """Loaders of the training and the test images of an `ImageData`, as the recipe wants them.

    Whole batches are made on `device`; for a recipe with `per_image`, `workers` processes make
    the training batches with albumentations.
    """
    augment, normalize = make_transforms(recipe, images)
    home = "cpu" if recipe.per_image else device
    train_loader = make_loader(
        images.train_images.to(home), images.train_labels.to(home), augment,
        batch_size=recipe.batch_size, shuffle=True, seed=seed, workers=workers,
    )
    test_loader = make_loader(
        images.test_images.to(device), images.test_labels.to(device), normalize, batch_size=1000,
    )
    return train_loader, test_loader


def loss_and_correct(model, images, labels, *, label_smoothing=0.0):
    """The batch's mean cross-entropy and its number of right answers, both scalar tensors."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return loss, (logits.argmax(1) == labels).sum()


def training_step(
    model, images, labels, optimizer, *, scaler, dtype, label_smoothing=0.0, gradient_clip=None
):
    """One optimizer step. Returns `loss_and_correct`, detached and still on the device.

    `scaler`: a torch.amp.GradScaler, which float16 needs; disabled it does nothing.
    """
    with autocast(images.device, dtype):
        loss, correct = loss_and_correct(model, images, labels, label_smoothing=label_smoothing)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if gradient_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(model.parameters(), gradient_clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), correct


def train_epoch(model, loader, optimizer, scheduler, *, bar=None, **step_settings):
    """One pass over `loader`. Returns the mean loss and the accuracy in percent, both over
    images, and the learning rate of the last step.

    Each batch counts by its size, so that a short last batch does not weigh too much. The sums
    stay on the device, which is asked for them only every 25th step and at the end.
    Raises InputError when the loss is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    loss_sum, correct_sum, count = torch.zeros((), device=device), 0, 0
    for step, (images, labels) in enumerate(loader):
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        loss, correct = training_step(model, images, labels, optimizer, **step_settings)
        rate = scheduler.get_last_lr()[0]
        scheduler.step()
        loss_sum += loss * len(labels)
        correct_sum += correct
        count += len(labels)
        if step % 25 == 0:
            assert_finite(loss_sum)
        if bar is not None:
            bar.update(len(labels))
    assert_finite(loss_sum)
    return loss_sum.item() / count, 100 * correct_sum.item() / count, rate


def assert_finite(loss):
    if not math.isfinite(loss):
        raise InputError(
            "the loss is not finite any more; lower the recipe's max_lr or give more epochs "
            "(the checkpoint of the last whole epoch is kept)"
        )


@torch.inference_mode()
def predict(model, loader, *, dtype=None):
    """Logits float32 (N, C) and labels int64 (N,) of a whole loader, in its order, on the CPU."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for images, batch_labels in loader:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        with autocast(device, dtype):
            logits.append(model(images).float())
        labels.append(batch_labels)
    model.train(was_training)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def evaluate(model, loader, *, dtype=None):
    """The mean cross-entropy and the accuracy in percent over all images of `loader`."""
    logits, labels = predict(model, loader, dtype=dtype)
    accuracy = 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy


def confusion_matrix(predictions, labels, num_classes):
    """Counts int64 (C, C): rows are true classes, columns predicted ones."""
    cells = labels * num_classes + predictions
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def misclassified(predictions, labels, *, count=10):
    """Indices int64 of at most `count` wrong predictions, spread evenly over all of them."""
    wrong = (predictions != labels).nonzero().squeeze(1)
    return wrong[torch.linspace(0, len(wrong) - 1, min(count, len(wrong))).long()]


class History(list):
    """One dict an epoch: epoch (from 1), lr (of its last step), train_loss, train_acc, test_loss,
    test_acc (percent), images_per_s and seconds (of training, without evaluation).

    Printed, it is an aligned table.
    """

    warm_up_seconds = 0.0  # of torch.compile, before the first epoch

    HEADER = "epoch        lr  train loss  train acc  test loss  test acc  images/s      time"
    ROW = (
        "{epoch:5d}  {lr:8.6f}  {train_loss:10.4f}  {train_acc:7.2f} %  {test_loss:9.4f}  "
        "{test_acc:6.2f} %  {images_per_s:8,.0f}  {seconds:6.1f} s"
    )

    def column(self, name):
        return [row[name] for row in self]

    def line(self, index):
        return self.ROW.format(**self[index])

    def __str__(self):
        return "\n".join([self.HEADER, *map(self.line, range(len(self)))])

    def save(self, path):
        """As CSV, with all digits."""
        write_csv(self, path)


def write_csv(rows, path):
    """Dicts with the same keys as CSV, whole or not at all."""
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def whole_file(path):
    """A path to write to; it takes the place of `path` only when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_weights(model, path, *, metadata=None, dtype=None):
    """The model's parameters and statistics as safetensors, which `models.load_weights` reads.

    `metadata`: a dict of plain values, kept in the file's header. `dtype`: what floating tensors
    are stored in, such as torch.float16 for half the size; None leaves them as they are. The same
    weights and metadata give the same bytes. Raises InputError where a value is too large for
    `dtype`.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if not tensor.isfinite().all():
                raise InputError(f"{name} is too large for {dtype}; leave the weights in float32")
        tensors[name] = tensor.contiguous()
    # One entry, because safetensors writes several in an order that changes from file to file.
    about = {"run": json.dumps(metadata or {}, sort_keys=True)}
    with whole_file(path) as part:
        save_file(tensors, part, about)


def fit(
    model,
    train_loader,
    test_loader,
    optimizer,
    scheduler,
    *,
    recipe,
    dtype=None,
    checkpoint=None,
    resume=False,
    identity=None,
    compiled=False,
):
    """Trains for `recipe.epochs` epochs and evaluates after each. Returns the `History`.

    With `checkpoint`, a path, everything is saved there after each epoch, whole or not at all.
    With `resume` a run that was cut off goes on after its last whole epoch; on a CPU it ends
    with the same weights, bit for bit, as one that never was. Raises InputError for a checkpoint
    that is damaged or belongs to another run, where `identity`, a dict of plain values, or the
    recipe differ. Each line of the table is printed as soon as it is known. `compiled` compiles
    the model first, and the history's `warm_up_seconds` tell how long that took.
    """
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    identity = {"recipe": recipe.identity(), **(identity or {})}
    history = History()
    if resume and checkpoint and Path(checkpoint).exists():
        history.extend(_load_checkpoint(checkpoint, parts, identity, device))
    images = len(train_loader.dataset)
    if compiled:
        size = next(iter(test_loader))[0].shape[-2:]
        sizes = {(recipe.size(epoch),) * 2 if recipe.sizes else size
                 for epoch in range(len(history), recipe.epochs)}
        batches = {recipe.batch_size, images % recipe.batch_size} - {0}
        shapes = [(batch, 3, *size) for batch in batches for size in sizes]
        tested = {images.shape for images, _ in test_loader}
        history.warm_up_seconds = compile_model(model, shapes, tested, dtype=dtype)
    with progress_bar(
        total=images * recipe.epochs, initial=images * len(history), unit=" images", smoothing=0.05
    ) as bar:
        bar.write(str(history))
        for epoch in range(len(history), recipe.epochs):
            bar.set_description(f"epoch {epoch + 1} of {recipe.epochs}")
            train_loader.set_epoch(epoch)
            start = time.perf_counter()
            train_loss, train_acc, rate = train_epoch(
                model,
                train_loader,
                optimizer,
                scheduler,
                bar=bar,
                scaler=scaler,
                dtype=dtype,
                label_smoothing=recipe.label_smoothing,
                gradient_clip=recipe.gradient_clip,
            )
            seconds = time.perf_counter() - start
            test_loss, test_acc = evaluate(model, test_loader, dtype=dtype)
            assert_finite(test_loss)
            history.append({
                "epoch": epoch + 1, "lr": rate,
                "train_loss": train_loss, "train_acc": train_acc,
                "test_loss": test_loss, "test_acc": test_acc,
                "images_per_s": images / seconds, "seconds": seconds,
            })
            if checkpoint:
                _save_checkpoint(checkpoint, parts, identity, history)
            bar.write(history.line(-1))
            sys.stdout.flush()
    return history


def compile_model(model, trained, tested, *, dtype=None):
    """Has torch.compile make code for batches of these shapes. Returns the seconds.

    `trained` and `tested`: shapes of batches, for training and for evaluation. The model is left
    as it was. Raises InputError where there is no compiler.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # as many versions as there are shapes; beyond its limit torch goes on without, silently
    torch._dynamo.config.recompile_limit = max(8, len(trained) + len(tested))
    model.compile(dynamic=False)
    try:
        for shape in trained:
            images = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
            with autocast(device, dtype):
                logits = model.train()(images)
            logits.float().sum().backward()
        for shape in tested:
            predict(model, [(torch.zeros(shape), torch.zeros(shape[0]))], dtype=dtype)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"torch.compile fails here ({reason}); leave out --compile") from error
    model.train().zero_grad()
    model.load_state_dict(state)
    return time.perf_counter() - start


def _save_checkpoint(path, parts, identity, history):
    state = {name: part.state_dict() for name, part in parts.items()}
    with whole_file(path) as part:
        torch.save({"identity": identity, "history": list(history), **state}, part)


def read_checkpoint(path, identity, *, device="cpu"):
    """What `path` holds, a dict. Raises InputError where it is damaged or of another run."""
    try:
        # weights_only: a file from elsewhere must not run code
        saved = torch.load(path, map_location=device, weights_only=True)
        differing = [key for key in identity if saved["identity"].get(key) != identity[key]]
    except Exception as error:  # a damaged file raises a dozen kinds, from OSError to UnicodeError
        raise InputError(
            f"the checkpoint {path} is damaged or none of ours; delete it to start anew"
        ) from error
    if differing:
        raise InputError(
            f"the checkpoint {path} belongs to another run (its {' and '.join(differing)} "
            "differs); delete it or choose another folder (--out)"
        )
    return saved


def _load_checkpoint(path, parts, identity, device):
    """Puts the saved states into `parts`. Returns the history's rows."""
    saved = read_checkpoint(path, identity, device=device)
    for name, part in parts.items():
        if saved[name]:  # a scaler that was not in use is empty
            part.load_state_dict(saved[name])
    return saved["history"]
