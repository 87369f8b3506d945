"""The training of `training.fit` under PyTorch Lightning: logs, checkpoints, several processes.

Model, loss, optimizer, schedule, transforms and data are the plain loop's. With one process in
float32 on a CPU both loops end with the same weights, bit for bit.
"""

import csv
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from utils import InputError, training
from utils.data import make_loader
from utils.progress import progress_bar
from utils.schedule import one_cycle

for name in ("lightning.pytorch", "lightning.fabric"):  # advertisements and the obvious
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

CHECKPOINT = "last.ckpt"
PRECISIONS = {None: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}


class ImageDataModule(LightningDataModule):
    """An `ImageData` as batches of uint8, which are augmented on the device that trains.

    The recipe's batch is shared by all processes. Each of them has images and draws of its own.
    """

    def __init__(self, recipe, images, *, seed=0):
        super().__init__()
        self.recipe, self.images, self.seed = recipe, images, seed
        self.augment, self.normalize = training.make_transforms(recipe, images)
        self.evaluated = {"test": (images.test_images, images.test_labels)}
        if images.validation_images is not None:
            self.evaluated["val"] = images.validation_images, images.validation_labels

    def train_dataloader(self):
        images, labels = self.images.train_images, self.images.train_labels
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        batch_size, rest = divmod(self.recipe.batch_size, processes)
        if rest or batch_size < 2:
            raise InputError(
                f"{processes} processes can't share a batch of {self.recipe.batch_size} evenly; "
                f"choose a --batch-size that is a multiple of {processes}"
            )
        sampler = None
        if processes > 1:
            sampler = DistributedSampler(labels, processes, rank, seed=self.seed)
        return make_loader(
            images, labels, self.augment, raw=True, batch_size=batch_size,
            shuffle=sampler is None, sampler=sampler,
            seed=self.seed + (rank << 32),  # each process has draws of its own
        )

    def val_dataloader(self):
        """Of the test images, which are watched but decide nothing, and of the validation images.

        Each process takes every n-th image. A DistributedSampler would repeat some of them, to
        give all processes as many, and they would count twice.
        """
        share = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return [
            make_loader(images[share], labels[share], self.normalize, raw=True, batch_size=1000)
            for images, labels in self.evaluated.values()
        ]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        if images.dtype == torch.uint8:  # albumentations' images come ready
            images = (self.augment if self.trainer.training else self.normalize)(images)
        return images.to(memory_format=torch.channels_last), labels


class Classifier(LightningModule):
    """A model with its recipe: what happens in a step, and what is logged after an epoch.

    `identity`, a dict of plain values, goes into the checkpoints. Accuracies are in percent.
    """

    def __init__(self, model, recipe, num_classes, *, identity=None):
        super().__init__()
        self.model, self.recipe = model, recipe
        self.identity = {"recipe": recipe.identity(), **(identity or {})}
        self.train_loss, self.train_acc = _mean(), _mean()
        self.loss = nn.ModuleDict({"test": _mean(), "val": _mean()})
        self.confusion = nn.ModuleDict({
            name: MulticlassConfusionMatrix(num_classes, validate_args=False)
            for name in ("test", "val")
        })

    def configure_optimizers(self):
        optimizer = training.make_optimizer(self.model, self.recipe)
        steps = self.trainer.estimated_stepping_batches
        schedule = one_cycle(optimizer, total_steps=steps, **self.recipe.rates())
        return [optimizer], [{"scheduler": schedule, "interval": "step", "name": "lr"}]

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss, correct = training.loss_and_correct(
            self.model, images, labels, label_smoothing=self.recipe.label_smoothing
        )
        self.train_loss.update(loss.detach().expand(len(labels)))  # counts once an image
        self.train_acc.update((100 * correct / len(labels)).expand(len(labels)))
        self.log_dict(
            {"train_loss": self.train_loss, "train_acc": self.train_acc},
            on_step=False, on_epoch=True,
        )
        return loss

    def on_validation_start(self):
        # SyncBatchNorm needs a GPU. On CPUs each process has statistics of its own by now, and
        # all must evaluate, and save, the same model.
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))
        for metric in (*self.loss.values(), *self.confusion.values()):
            metric.reset()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        images, labels = batch
        logits = self.model(images).float()
        name = list(self.trainer.datamodule.evaluated)[dataloader_idx]
        self.loss[name].update(F.cross_entropy(logits, labels, reduction="none"))
        self.confusion[name].update(logits, labels)

    def on_validation_epoch_end(self):
        for name in self.trainer.datamodule.evaluated:
            matrix = self.confusion[name].compute()  # summed over all processes
            self.log_dict({
                f"{name}_loss": self.loss[name].compute(),
                f"{name}_acc": 100 * matrix.trace() / matrix.sum(),
            })

    def on_save_checkpoint(self, checkpoint):
        checkpoint["identity"] = self.identity


def _mean():
    # Its search for NaN would wait for the device in every step. Without the search
    # torchmetrics 1.9 ignores `weight`, so a batch's mean goes in once for each image.
    return MeanMetric(nan_strategy="disable")


class EpochTable(Callback):
    """Keeps the `History`, prints its lines as soon as they are known, and shows a progress bar."""

    def __init__(self):
        self.history = training.History()
        self.bar = None  # of the first process alone

    def state_dict(self):
        return {"history": list(self.history)}

    def load_state_dict(self, state):
        self.history = training.History(state["history"])

    def on_fit_start(self, trainer, module):
        self.images = len(trainer.datamodule.images.train_images)
        if trainer.is_global_zero:
            self.bar = progress_bar(
                total=self.images * trainer.max_epochs, initial=self.images * len(self.history),
                unit=" images", smoothing=0.05,
            )
            self.bar.write(str(self.history))

    def on_train_epoch_start(self, trainer, module):
        self.start = time.perf_counter()
        if self.bar is not None:
            self.bar.set_description(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_last_batch and module.device.type != "cpu":
            torch.accelerator.synchronize(module.device)
        self.seconds = time.perf_counter() - self.start
        if self.bar is not None:
            self.bar.update(len(batch[1]) * trainer.world_size)

    def on_train_epoch_end(self, trainer, module):
        images_per_s = self.images / self.seconds
        module.log("images_per_s", images_per_s)
        names = ("train_loss", "train_acc", "test_loss", "test_acc")
        self.history.append({
            "epoch": trainer.current_epoch + 1, "lr": self.rate,
            **{name: trainer.callback_metrics[name].item() for name in names},
            "images_per_s": images_per_s, "seconds": self.seconds,
        })
        training.assert_finite(self.history[-1]["train_loss"] + self.history[-1]["test_loss"])
        if self.bar is not None:
            self.bar.write(self.history.line(-1))

    def on_train_end(self, trainer, module):
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer, module, exception):
        self.on_train_end(trainer, module)


class WholeFileIO(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all.

    Lightning's own are copied where the temporary folder is on another disk, and a copy can be
    cut off.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        with training.whole_file(path) as part:
            torch.save(checkpoint, part)


def make_trainer(
    recipe, out, *, device, dtype=None, validation=True, devices=1, num_nodes=1, strategy="auto"
):
    """A Trainer that writes checkpoints and logs to the folder `out`.

    With `validation` it keeps the checkpoint with the best accuracy on the validation images as
    well, best.ckpt; the test images are never asked. Raises InputError for settings that
    Lightning refuses.
    """
    out = Path(out)
    files = {"dirpath": out, "enable_version_counter": False, "save_on_train_epoch_end": True}
    callbacks = [
        EpochTable(),
        LearningRateMonitor("step"),
        ModelCheckpoint(filename=Path(CHECKPOINT).stem, **files),
    ]
    if validation:
        callbacks.append(ModelCheckpoint(filename="best", monitor="val_acc", mode="max", **files))
    try:
        return Trainer(
            max_epochs=recipe.epochs,
            accelerator=device.type,
            devices=[device.index] if devices == 1 and device.index is not None else devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=PRECISIONS[dtype],
            sync_batchnorm=device.type == "cuda",  # does nothing in a single process
            gradient_clip_val=recipe.gradient_clip,
            gradient_clip_algorithm="value",
            use_distributed_sampler=False,  # ImageDataModule shares out the images
            num_sanity_val_steps=0,
            logger=[
                # a folder for each start: where it finds an older log it would delete it
                CSVLogger(out, name="csv", flush_logs_every_n_steps=1),
                TensorBoardLogger(out, name="tensorboard", version="", default_hp_metric=False),
            ],
            log_every_n_steps=5,
            callbacks=callbacks,
            plugins=[WholeFileIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(f"Lightning: {' '.join(str(error).split())}") from error


def fit(trainer, module, images, *, resume=False):
    """Trains `module` on an `ImageDataModule`. Returns the `History`.

    With `resume` a run that was cut off goes on after its last whole epoch. Raises InputError
    for a checkpoint that is damaged or belongs to another run.
    """
    table = next(callback for callback in trainer.callbacks if isinstance(callback, EpochTable))
    checkpoint = Path(trainer.checkpoint_callback.dirpath) / CHECKPOINT
    checkpoint = checkpoint if resume and checkpoint.exists() else None
    if checkpoint:
        training.read_checkpoint(checkpoint, module.identity)
    try:
        trainer.fit(module, images, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None
    return table.history


def read_log(out):
    """The CSV logs of all starts of the run in the folder `out`: {name: {step: value}}."""
    log = {}
    paths = Path(out, "csv").glob("version_*/metrics.csv")
    for path in sorted(paths, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                for name in row:
                    if row[name] and name != "step":
                        log.setdefault(name, {})[int(row["step"])] = float(row[name])
    return log


def log_pictures(out, pictures, *, step):
    """Adds the PNG files `pictures` to the TensorBoard log of the run in the folder `out`."""
    with SummaryWriter(Path(out) / "tensorboard") as writer:
        for path in pictures:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            writer.add_image(path.stem, pixels, step, dataformats="HWC")
