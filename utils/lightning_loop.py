"""The training of `training.fit` under PyTorch Lightning: logs, checkpoints, several processes.

Model, loss, optimizer, schedule, transforms and batches are the plain loop's. With one process in
float32 on a CPU both loops end with the same weights, bit for bit.
"""

import copy
import logging
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.nn import functional as F

from utils import InputError, files, training
from utils.batches import evaluation_batches, training_batches
from utils.devices import clock
from utils.optimization import clip_gradients, make_optimizer, one_cycle, update_average

for name in ("lightning.pytorch", "lightning.fabric"):  # advertisements and the obvious
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

CHECKPOINT = files.CHECKPOINTS["lightning"]
PRECISION_NAMES = {None: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}


class ImageDataModule(LightningDataModule):
    """The batches of an `ImageData`, made on the device that trains.

    The recipe's batch is shared by all processes. Each of them has images and draws of its own.
    """

    def __init__(self, recipe, images, *, seed=0):
        super().__init__()
        self.recipe, self.images, self.seed = recipe, images, seed
        self.evaluated = {"test": "test"}  # {name in the log: part of the data}
        if images.validation_images is not None:
            self.evaluated["val"] = "validation"

    def place(self):
        """Which device, and which of how many processes, this one is."""
        return {
            "device": self.trainer.strategy.root_device,
            "rank": self.trainer.global_rank, "processes": self.trainer.world_size,
        }

    def train_dataloader(self):
        return training_batches(self.recipe, self.images, seed=self.seed, **self.place())

    def val_dataloader(self):
        """Of the test images, which are watched but decide nothing, and of the validation images.

        A DistributedSampler would repeat some of them, to give all processes as many, and they
        would count twice.
        """
        return [
            evaluation_batches(self.images, split, **self.place())
            for split in self.evaluated.values()
        ]


class Classifier(LightningModule):
    """A model with its recipe: what happens in a step, and what is logged after an epoch.

    `identity`, a dict of plain values, goes into the checkpoints. Accuracies are in percent. Where
    the recipe averages weights, `average` is the network that is evaluated.
    """

    def __init__(self, model, recipe, *, identity=None):
        super().__init__()
        self.model, self.recipe, self.identity = model, recipe, identity or {}
        self.average = copy.deepcopy(model).requires_grad_(False) if recipe.averaging else None

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model, self.recipe)
        steps = self.trainer.estimated_stepping_batches
        schedule = one_cycle(optimizer, self.recipe, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "name": "lr"}]

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        images = images.to(memory_format=torch.channels_last)
        loss, correct = training.loss_and_correct(self.model, images, labels, self.recipe)
        self.log_means("train", loss.detach(), correct, len(labels))
        return loss

    def configure_gradient_clipping(self, optimizer, **_):
        """Lightning refuses to clip for optimizers that take out the scale of float16 themselves.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler and self.recipe.gradient_clip:
            scaler.unscale_(optimizer)
        clip_gradients(self.model, self.recipe)

    def on_train_batch_end(self, *_):
        if self.average:
            first = self.trainer.global_step == 1
            update_average(self.average, self.model, self.recipe.averaging, first=first)

    def on_validation_start(self):
        # SyncBatchNorm needs a GPU. On CPUs each process has statistics of its own by now, and
        # all must evaluate, and save, the same model.
        for buffer in self.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        images, labels = batch
        network = self.average or self.model
        logits = network(images.to(memory_format=torch.channels_last)).float()
        correct = (logits.argmax(1) == labels).sum()
        name = list(self.trainer.datamodule.evaluated)[dataloader_idx]
        self.log_means(name, F.cross_entropy(logits, labels), correct, len(labels))

    def log_means(self, name, loss, correct, count):
        """Logs a batch's mean loss and its accuracy, to be averaged over the epoch's images."""
        self.log_dict(
            {f"{name}_loss": loss, f"{name}_acc": 100 * correct / count}, on_step=False,
            on_epoch=True, sync_dist=True, add_dataloader_idx=False,
            batch_size=float(count),  # the mean over processes of whole numbers is rounded down
        )

    def on_save_checkpoint(self, checkpoint):
        checkpoint["identity"] = self.identity
        if self.average and "optimizer_states" not in checkpoint:  # weights alone: the evaluated
            states = self.average.state_dict().items()
            checkpoint["state_dict"] = {f"model.{name}": tensor for name, tensor in states}


class EpochTable(Callback):
    """Keeps the history, prints its lines as soon as they are known, and shows a progress bar.

    A row is the plain loop's, and has `val_loss` and `val_acc` where there are validation images.
    `dtype`: that of the training.
    """

    def __init__(self, dtype):
        self.dtype, self.history = dtype, []
        self.bar = None

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = state["history"]

    def on_fit_start(self, trainer, module):
        self.images = len(trainer.datamodule.images.train_images)
        hidden = {} if trainer.is_global_zero else {"disable": True}
        self.bar = training.begin_table(
            self.history, images=self.images, epochs=trainer.max_epochs, dtype=self.dtype, **hidden
        )

    def on_train_epoch_start(self, trainer, module):
        self.start = time.perf_counter()
        self.bar.set_description(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]
        if trainer.global_step % trainer.log_every_n_steps == 0:  # the first, too
            for logger in trainer.loggers:  # LearningRateMonitor waits for the device
                logger.log_metrics({"lr": self.rate}, step=trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        now = clock(module.device) if trainer.is_last_batch else time.perf_counter()
        self.seconds = now - self.start
        self.bar.update(len(batch[1]) * trainer.world_size)

    def on_train_epoch_end(self, trainer, module):
        known = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row = training.history_row(
            trainer.current_epoch + 1, lr=self.rate, images=self.images, seconds=self.seconds,
            device=module.device, dtype=self.dtype,
            **{name: (known[f"{name}_loss"], known[f"{name}_acc"]) for name in ("train", "test")},
        )
        row |= {name: known[name] for name in known if name.startswith("val_")}
        self.history.append(row)
        module.log("images_per_s", row["images_per_s"])
        self.bar.write(training.ROW.format(**row))

    def on_fit_end(self, trainer, module):  # also where nothing was left to train
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer, module, exception):
        self.on_fit_end(trainer, module)


class Best(ModelCheckpoint):
    """A checkpoint of the best epoch, in a run whose folder may be moved."""

    def load_state_dict(self, state):
        """From another folder Lightning would forget which was the best."""
        super().load_state_dict({**state, "dirpath": self.dirpath})


class WholeFileIO(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all.

    Lightning's own are copied where the temporary folder is on another disk, and a copy can be
    cut off.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        files.save_objects(checkpoint, path)


def make_trainer(
    recipe, out, *, device, dtype=None, validation=True, devices=1, num_nodes=1, strategy="auto"
):
    """A Trainer that writes checkpoints and logs to the folder `out`.

    With `validation` it keeps the weights with the best accuracy on the validation images as
    well, best.ckpt; the test images are never asked. Raises InputError for settings that
    Lightning refuses.
    """
    if device.type == "cpu" and dtype == torch.float16:
        raise InputError("Lightning has no float16 on CPUs; choose another --precision")
    if devices > 1 and device.index is not None:
        raise InputError(f"{device} is one device; leave out its number, or --devices {devices}")
    plugins = [WholeFileIO()]
    if devices * num_nodes == 1:  # whatever RANK or SLURM_PROCID say
        plugins.append(LightningEnvironment())
        rank_zero_only.rank = 0
    elif SLURMEnvironment.detect():  # requeueing would leave a checkpoint beside ours
        plugins.append(SLURMEnvironment(auto_requeue=False))
    keep = {"dirpath": out, "enable_version_counter": False, "save_on_train_epoch_end": True}
    callbacks = [EpochTable(dtype)]
    if validation:
        callbacks.append(Best(
            filename="best", monitor="val_acc", mode="max", save_weights_only=True, **keep
        ))
    # after the best, so that it knows which that was
    callbacks.append(ModelCheckpoint(filename=Path(CHECKPOINT).stem, **keep))
    try:
        trainer = Trainer(
            max_epochs=recipe.epochs,
            accelerator=device.type,
            devices=devices if device.index is None else [device.index],
            num_nodes=num_nodes,
            strategy=strategy,
            precision=PRECISION_NAMES[dtype],
            sync_batchnorm=device.type == "cuda",  # does nothing in a single process
            use_distributed_sampler=False,  # ImageDataModule shares out the images
            num_sanity_val_steps=0,
            logger=[
                # a folder for each start: where it finds an older log it would delete it
                CSVLogger(out, name="csv", flush_logs_every_n_steps=1),
                TensorBoardLogger(out, name="tensorboard", version="", default_hp_metric=False),
            ],
            log_every_n_steps=5,
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=out,  # where a checkpoint from SLURM would be looked for
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(f"Lightning: {' '.join(str(error).split())}") from error
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError("spawned or forked processes keep their results; choose --strategy ddp")
    return trainer


def fit_trainer(trainer, module, datamodule, *, resume=False):
    """Trains `module` on an `ImageDataModule`. Returns the history, a list.

    With `resume` a run that was cut off goes on after its last whole epoch. Raises InputError
    for a checkpoint that is damaged or belongs to another run, or one of other processes. Leaves
    the module in evaluation mode.
    """
    table = next(callback for callback in trainer.callbacks if isinstance(callback, EpochTable))
    checkpoint = Path(trainer.checkpoint_callback.dirpath) / CHECKPOINT
    begun = checkpoint if resume and checkpoint.exists() else None
    module.identity["process count"] = trainer.world_size
    module.train()  # Lightning keeps the mode that it finds
    if begun:
        files.read_checkpoint(begun, module.identity)
    try:
        trainer.fit(module, datamodule, ckpt_path=begun, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None
    if module.average:
        module.model.load_state_dict(module.average.state_dict())
    module.eval()
    return table.history


def read_log(out):
    """The CSV logs of all starts of the run in the folder `out`: a DataFrame by step.

    A column for each figure; where a step was logged twice, the later start counts.
    """
    paths = sorted(
        Path(out, "csv").glob("version_*/metrics.csv"),
        key=lambda path: int(path.parent.name.removeprefix("version_")),
    )
    return pd.concat([pd.read_csv(path) for path in paths]).groupby("step").last()
