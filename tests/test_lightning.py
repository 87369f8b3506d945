"""PyTorch Lightning's loop: the same training, its logs and checkpoints, several processes."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import (
    CPU,
    ON_CPU,
    CutOffError,
    Small,
    assert_same_state,
    cut_off_after,
    read_history,
    tiny_images,
    without_times,
    write_folder,
)
from utils import (
    InputError,
    batches,
    data,
    explain,
    files,
    lightning_loop,
    models,
    run,
    train,
    training,
)
from utils.models import load_weights
from utils.optimization import one_cycle_rates
from utils.recipes import recipe
from utils.transforms import Normalization

SHORT = ["--epochs", "3", "--batch-size", "12", "--cutout", "2", *ON_CPU]
FIGURES = ("train_loss", "train_acc", "test_loss", "test_acc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the recipe s12 36 training, 3 validation and 21 test pictures."""
    return write_folder(tmp_path_factory.mktemp("pictures") / "tiny", train=13, test=7, side=8)


@pytest.fixture(scope="module")
def images(folder):
    return data.with_validation(data.load(folder))


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """The folder of a run that nothing has cut off."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        train.main(["s12", "--data", str(folder), "--out", str(out), *SHORT])
    return out


def run_script(path, text, *arguments):
    """Runs `text`, which begins with the small network and without figures, as a program."""
    path.write_text(
        "from conftest import Small\n"
        "from utils import data, lightning_loop, models, run, train\n"
        "models.MODELS['custom_resnet'] = Small\n"
        f"run.save_figures = lambda *_: []\n{text}"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent)))}
    return subprocess.run(
        [sys.executable, path, *map(str, arguments)], env=environment, timeout=120,
        capture_output=True, text=True,
    )


def as_process(datamodule, rank=0, processes=1, device=CPU):
    """The data module of one of several processes."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    datamodule.trainer = SimpleNamespace(
        global_rank=rank, world_size=processes, strategy=strategy
    )
    return datamodule


# The same training


@pytest.mark.parametrize("name, changes", [
    ("s10", {}), ("s10_cpu", {"sizes": (8, 16)}), ("resnet9", {}), ("s12", {}),
    ("s10_best", {}),
])
def test_both_loops_train_the_same(name, changes, tmp_path):
    """The weights are equal bit for bit; the figures up to float32's rounding of the sums."""
    settings = recipe(name).scaled(epochs=2, batch_size=16).replace(width=8, **changes)
    images = data.with_validation(tiny_images(16), fraction=settings.held_out)
    model, plain = run.train_plain(settings, images, seed=3, device=CPU)
    other, history = run.train_lightning(settings, images, seed=3, device=CPU, out=tmp_path)

    assert_same_state(other, model)
    assert len(history) == 2
    for row, expected in zip(history, plain, strict=True):
        validation = ["val_loss", "val_acc"] if settings.held_out else []
        assert list(row) == [*expected, *validation]
        assert row["lr"] == expected["lr"]
        assert [row[key] for key in FIGURES] == pytest.approx([expected[key] for key in FIGURES])
    planned = one_cycle_rates(settings, total_steps=2 * -(-len(images.train_images) // 16))
    logged = lightning_loop.read_log(tmp_path)["lr"].dropna().to_dict()
    assert logged == {step: pytest.approx(planned[step]) for step in (0, 5)}


def test_the_log_of_all_starts_is_read_in_their_order(tmp_path):
    """Each of eleven starts logs one step anew and one more, its number as the rate."""
    for start in range(11):
        folder = tmp_path / "csv" / f"version_{start}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,lr\n{start},{start}\n{start + 1},{start}\n")
    rates = lightning_loop.read_log(tmp_path)["lr"].to_dict()
    assert rates == {**{step: step for step in range(11)}, 11: 10}


def test_the_trainer_gets_what_was_asked_for(small_network, tmp_path, monkeypatch):
    asked = {}

    def trainer(**settings):
        asked.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(lightning_loop, "Trainer", trainer)
    scale = {"devices": 4, "num_nodes": 2, "strategy": "ddp"}
    with pytest.raises(InputError, match="enough"):
        run.train_lightning(recipe("s12").replace(held_out=0.0), tiny_images(), out=tmp_path,
                            device=torch.device("cuda"), dtype=torch.float16, **scale)
    expected = {**scale, "accelerator": "cuda", "sync_batchnorm": True, "precision": "16-mixed"}
    assert asked.items() >= expected.items()


@pytest.mark.parametrize("changes, dtype", [
    ({"gradient_clip": 0.01}, torch.bfloat16),  # which Lightning refuses for fused optimizers
    ({"per_image": True}, None),
])
def test_small_network_trains_the_same(changes, dtype, small_network, tmp_path):
    settings = recipe("s10").scaled(epochs=2, batch_size=16).replace(cutout=2, **changes)
    how = {"device": CPU, "dtype": dtype}
    plain, _ = run.train_plain(settings, tiny_images(), **how)
    lightning, _ = run.train_lightning(settings, tiny_images(), out=tmp_path, **how)
    assert_same_state(lightning, plain)


def test_batches_are_on_the_device_that_trains(images):
    """From the start: no step waits for a copy."""
    datamodule = as_process(lightning_loop.ImageDataModule(recipe("s12"), images), device="meta")
    loaders = [datamodule.train_dataloader(), *datamodule.val_dataloader()]
    assert {loaders[0].images.device.type, loaders[0].labels.device.type} == {"meta"}
    for loader in loaders[1:]:
        assert {tensor.device.type for batch in loader for tensor in batch} == {"meta"}


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has a CPU alone")
def test_run_on_an_accelerator(folder, small_network, no_figures, tmp_path):
    train.main(["s12", "--data", str(folder), "--out", str(tmp_path / "out"), *SHORT[:-4]])
    assert len(read_history(tmp_path / "out")) == 3


# Files of a run


def test_run_writes_these_files(out):
    names = {path.name for path in out.iterdir()} - {"misclassified.png"}
    figures = {"schedule.png", "loss.png", "accuracy.png", "per_class.png", "confusion.png"}
    tables = {"history.csv", "metrics.json", "weights.safetensors"}
    assert names == figures | tables | {"last.ckpt", "best.ckpt", "csv", "tensorboard"}
    assert [path.name for path in (out / "csv").iterdir()] == ["version_0"]
    assert [row["epoch"] for row in read_history(out)] == [1, 2, 3]


def test_logs_agree_with_the_history(out):
    """That for tables and that of TensorBoard."""
    table = lightning_loop.read_log(out)
    log = EventAccumulator(str(out / "tensorboard"))
    log.Reload()
    assert {"lr", "images_per_s", "val_loss", "val_acc"} <= set(log.Tags()["scalars"])
    last_steps = [2, 5, 8]  # of each epoch
    assert list(table["val_acc"].dropna().index) == last_steps
    for name in (*FIGURES, "val_loss", "val_acc"):
        history = [row[name] for row in read_history(out)]
        assert table[name].dropna().to_dict() == pytest.approx(
            dict(zip(last_steps, history, strict=True))
        )
        events = [(event.step, event.value) for event in log.Scalars(name)]
        assert [step for step, _ in events] == last_steps
        assert [value for _, value in events] == pytest.approx(history)


def test_best_checkpoint_is_chosen_on_validation_images(out, images, tmp_path):
    monitors = {}
    for validation in (True, False):
        trainer = lightning_loop.make_trainer(
            recipe("s12"), tmp_path, device=CPU, validation=validation
        )
        monitors[validation] = [callback.monitor for callback in trainer.checkpoint_callbacks]
    assert monitors == {True: ["val_acc", None], False: [None]}

    accuracies = lightning_loop.read_log(out)["val_acc"].dropna()
    best = files.read_checkpoint(out / "best.ckpt")
    assert best["epoch"] == accuracies.to_numpy().argmax()
    assert best["state_dict"] and "optimizer_states" not in best  # a third of the bytes

    # They are training images which are not trained on, and none of the test images.
    pictures = {
        name: {image.numpy().tobytes() for image in getattr(images, f"{name}_images")}
        for name in ("train", "validation", "test")
    }
    assert [len(pictures[name]) for name in pictures] == [36, 3, 21]
    assert len(set.union(*pictures.values())) == 36 + 3 + 21


@pytest.mark.parametrize("averaging", [0.0, 0.5])
def test_best_checkpoint_holds_the_network_with_the_noted_accuracy(
    averaging, small_network, tmp_path
):
    """The run is cut off after its best epoch, moved, and goes on with worse ones: it unlearns
    labels that are wrong."""
    settings = recipe("s10").scaled(epochs=3, batch_size=14).replace(
        cutout=2, averaging=averaging, min_lr=0.01, max_lr=0.03
    )
    tiny = tiny_images()
    wrong = (tiny.train_labels + 1) % 3
    tiny = replace(tiny, validation_images=tiny.train_images, validation_labels=wrong)
    before, after = tmp_path / "before", tmp_path / "after"
    with cut_off_after(4):  # an epoch has three steps
        run.train_lightning(settings, tiny, device=CPU, out=before)
    shutil.move(before, after)
    _, history = run.train_lightning(settings, tiny, device=CPU, out=after, resume=True)
    accuracies = [row["val_acc"] for row in history]
    best = files.read_checkpoint(after / "best.ckpt")
    assert best["epoch"] == 0 and accuracies[0] > max(accuracies[1:])
    network = models.build(settings, tiny)
    network.load_state_dict({
        name.removeprefix("model."): tensor for name, tensor in best["state_dict"].items()
    })
    asked = batches.evaluation_batches(tiny, "validation", device=CPU)
    assert training.predict(network, asked).accuracy == pytest.approx(max(accuracies))


def test_checkpoint_knows_its_run(out, images, small_network, tmp_path):
    checkpoint = files.read_checkpoint(out / "last.ckpt")
    settings = recipe("s12").scaled(epochs=3, batch_size=12).replace(cutout=2)
    assert checkpoint["epoch"] == 2
    assert checkpoint["identity"] == {
        "recipe": settings.settings(), "process count": 1, "seed": 0, "data": images.fingerprint,
    }
    with pytest.raises(InputError, match="its process count differs"):
        run.train_lightning(settings, images, device=CPU, devices=2, out=out, resume=True)


@pytest.mark.parametrize("arguments, words", [
    ([], "--resume"),
    (["--resume", "--seed", "1"], "seed differs"),
    (["--resume", "--label-smoothing", "0.2"], "recipe differs"),
    (["--resume", "--loop", "plain"], "--loop lightning"),
])
def test_folder_of_another_run(folder, out, small_network, arguments, words):
    before = (out / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit, match=words):
        train.main(["s12", "--data", str(folder), "--out", str(out), *SHORT, *arguments])
    assert (out / "last.ckpt").read_bytes() == before


def test_damaged_checkpoint(folder, out, tmp_path):
    damaged = tmp_path / "last.ckpt"
    damaged.write_bytes((out / "last.ckpt").read_bytes()[:10_000])
    with pytest.raises(SystemExit, match="last.ckpt can.t be read .* damaged"):
        train.main(["s12", "--data", str(folder), "--out", str(tmp_path), *SHORT, "--resume"])


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, small_files):
    path = tmp_path / "last.ckpt"
    path.write_text("old")
    with small_files(1000), pytest.raises(InputError, match="last.ckpt can't be written"):
        lightning_loop.WholeFileIO().save_checkpoint({"x": torch.zeros(1000)}, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGUSR1")
def test_single_run_is_the_first_process_whatever_the_environment_says(
    folder, out, small_network, no_figures, tmp_path, monkeypatch
):
    """It logs. A checkpoint that SLURM's requeueing left is not gone on with, and none is made."""
    handlers = []

    def on_train_start(table, trainer, module):
        handlers.append(signal.getsignal(signal.SIGUSR1))

    monkeypatch.setattr(lightning_loop.EpochTable, "on_train_start", on_train_start, raising=False)
    for name in ("RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "s12")
    monkeypatch.setattr(lightning_loop.rank_zero_only, "rank", 1)  # as Lightning's import does
    monkeypatch.chdir(tmp_path)
    Path("hpc_ckpt_1.ckpt").write_bytes((out / "last.ckpt").read_bytes())
    train.main(["s12", "--data", str(folder), "--out", "mine", *SHORT, "--seed", "1"])
    assert handlers == [signal.SIG_DFL]
    assert [row["epoch"] for row in read_history(Path("mine"))] == [1, 2, 3]
    assert len(lightning_loop.read_log("mine")["test_loss"].dropna()) == 3


def test_slurm_requeues_no_run_of_several_processes(tmp_path, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "2")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "s12")
    trainer = lightning_loop.make_trainer(recipe("s12"), tmp_path, device=CPU, devices=2)
    environment = trainer.strategy.cluster_environment
    assert isinstance(environment, lightning_loop.SLURMEnvironment)
    assert not environment.auto_requeue
    assert trainer.default_root_dir == str(tmp_path)


# Runs that end early


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_run_resumes_as_if_nothing_had_been(
    folder, out, small_network, no_figures, tmp_path
):
    """SIGKILL in the middle of the second epoch."""
    script = """
import os, signal, sys

class Killed(lightning_loop.Classifier):
    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

lightning_loop.Classifier = Killed
train.main(sys.argv[1:])
"""
    killed = tmp_path / "killed"
    command = ["s12", "--data", str(folder), "--out", str(killed), *SHORT]
    process = run_script(tmp_path / "killed.py", script, *command)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (killed / "history.csv").read_bytes() == b""

    train.main([*command, "--resume"])
    assert_same_state(*(load_weights(path / "weights.safetensors") for path in (killed, out)))
    whole = without_times(read_history(out))
    assert without_times(read_history(killed)) == whole
    logs = [lightning_loop.read_log(path)["test_loss"].dropna() for path in (killed, out)]
    assert logs[0].equals(logs[1])
    assert not list(killed.glob("*.part"))

    finished = (killed / "last.ckpt").read_bytes()
    train.main([*command, "--resume"])  # nothing is left to do
    assert (killed / "last.ckpt").read_bytes() == finished
    assert without_times(read_history(killed)) == whole


def test_resumed_run_ends_with_the_averaged_weights(small_network, tmp_path, monkeypatch):
    """Cut off in its second epoch, and resumed once more when it was finished."""
    settings = recipe("s10").scaled(epochs=3, batch_size=16).replace(cutout=2, averaging=0.75)
    whole, _ = run.train_plain(settings, tiny_images(), device=CPU)

    def cut_off(module, batch, batch_idx):
        if (module.current_epoch, batch_idx) == (1, 1):
            raise CutOffError
        return step(module, batch, batch_idx)

    step, how = lightning_loop.Classifier.training_step, {"device": CPU, "out": tmp_path}
    monkeypatch.setattr(lightning_loop.Classifier, "training_step", cut_off)
    with pytest.raises(CutOffError):
        run.train_lightning(settings, tiny_images(), **how)
    monkeypatch.setattr(lightning_loop.Classifier, "training_step", step)
    for _ in range(2):
        resumed, history = run.train_lightning(settings, tiny_images(), resume=True, **how)
        assert_same_state(resumed, whole)
        assert [row["epoch"] for row in history] == [1, 2, 3]


def test_run_that_was_interrupted_in_an_evaluation_trains_on_in_training_mode(
    small_network, tmp_path, monkeypatch
):
    """The same module, which the interrupt leaves in evaluation mode."""
    settings = recipe("s10").scaled(epochs=3, batch_size=16).replace(cutout=2)
    whole, _ = run.train_plain(settings, tiny_images(), device=CPU)
    module = lightning_loop.Classifier(models.build(settings, tiny_images()), settings)
    step = lightning_loop.Classifier.validation_step

    def cut_off(module, batch, batch_idx):
        if module.current_epoch == 1:
            raise CutOffError
        step(module, batch, batch_idx)

    def fit():
        trainer = lightning_loop.make_trainer(settings, tmp_path, device=CPU, validation=False)
        datamodule = lightning_loop.ImageDataModule(settings, tiny_images())
        lightning_loop.fit_trainer(trainer, module, datamodule, resume=True)

    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr(lightning_loop.Classifier, "validation_step", cut_off)
        fit()
    fit()
    assert_same_state(module.model, whole)
    assert not module.model.training


def test_interrupted_run_says_how_to_go_on(folder, small_network, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lightning_loop.Classifier, "training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="--resume goes on"):
            train.main(["s12", "--data", str(folder), "--out", str(tmp_path / "out"), *SHORT])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the key from then on


def test_loss_that_is_not_finite_leaves_no_checkpoint(folder, small_network, tmp_path):
    with pytest.raises(SystemExit, match="not finite any more"):
        train.main(["s12", "--data", str(folder), "--out", str(tmp_path / "out"), *SHORT,
                    "--max-lr", "1e30"])
    assert not (tmp_path / "out" / "last.ckpt").exists()


# Several processes


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere gloo may not find the host")
def test_two_processes(small_network, tmp_path, monkeypatch):
    """2,001 test images can't be shared evenly: one process has one more.

    Each training image is grey of its own level but for its cutout, by which it is known.
    """
    generator = torch.Generator().manual_seed(0)
    tests = torch.randint(0, 256, (2001, 3, 8, 8), dtype=torch.uint8, generator=generator)
    greys = (6 * torch.arange(40, dtype=torch.uint8)).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    images = data.ImageData(
        "greys", ("a", "b"), greys, torch.arange(40) % 2, tests, torch.arange(2001) % 2
    )
    torch.save(vars(images), tmp_path / "images.pt")
    script = f"""
import sys, torch
arguments = torch.load({str(tmp_path / "images.pt")!r})
data.load = lambda _, **__: data.ImageData(**arguments)

class Watched(lightning_loop.Classifier):
    levels, places = [], []

    def training_step(self, batch, batch_idx):
        pixels = batch[0][:, 0].flatten(1)
        self.levels.append(pixels.median(1).values)
        self.places.append((pixels != pixels.median(1, keepdim=True).values).int().argmax(1))
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        watched = {{"levels": self.levels, "places": torch.cat(self.places),
                   "weights": self.model.state_dict()}}
        torch.save(watched, f"{{sys.argv[0]}}.{{self.global_rank}}")

lightning_loop.Classifier = Watched
train.main(sys.argv[1:])
"""
    without = [f"--{name}=0" for name in ("padding", "rotation", "brightness")]
    process = run_script(
        tmp_path / "watched.py", script, "s12", "--out", tmp_path / "two", *SHORT, *without,
        "--devices", 2, "--epochs", 2,
    )
    assert process.returncode == 0, process.stderr
    said = process.stderr.splitlines()
    assert [line for line in said if not line.startswith("[W")] == []  # torch's, of host names
    assert process.stdout.count("epoch        lr") == 1  # only one of them speaks

    first, second = (torch.load(tmp_path / f"watched.py.{rank}") for rank in (0, 1))
    sizes = [[len(levels) for levels in watched["levels"]] for watched in (first, second)]
    assert sizes == 2 * [2 * [6, 6, 6]]  # of the recipe's 12
    epochs = [torch.cat(watched["levels"]).view(2, 18) for watched in (first, second)]
    both = torch.cat(epochs, dim=1)
    assert [len(epoch.unique()) for epoch in both] == [36, 36]
    assert not torch.equal(epochs[0][0].sort().values, epochs[0][1].sort().values)
    assert not torch.equal(first["places"], second["places"])

    model = load_weights(tmp_path / "two" / "weights.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(first["weights"][name], tensor), name
        assert torch.equal(second["weights"][name], tensor), name
    alone, _ = explain.plain_and_flipped(model, images)
    last = read_history(tmp_path / "two")[-1]
    assert (last["test_acc"], last["test_loss"]) == pytest.approx((alone.accuracy, alone.loss))
    assert len(list((tmp_path / "two" / "csv").iterdir())) == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_evaluate_each_image_once_in_as_many_batches(images, processes, monkeypatch):
    monkeypatch.setattr(batches, "EVALUATION_BATCH", 5)
    loaders = [
        as_process(lightning_loop.ImageDataModule(recipe("s12"), images), rank, processes)
        .val_dataloader()
        for rank in range(processes)
    ]
    for expected, shards in zip(
        (images.test_images, images.validation_images), zip(*loaders, strict=True), strict=True
    ):
        assert len({len(list(shard)) for shard in shards}) == 1
        normalized = Normalization(*images.statistics)(expected)
        seen = [image.numpy() for shard in shards for batch, _ in shard for image in batch]
        assert np.array_equal(sorted(map(np.ndarray.tobytes, seen)),
                              sorted(image.numpy().tobytes() for image in normalized))


def test_processes_evaluate_the_same_statistics(small_network):
    """Those of averaged weights too. Here the mean over processes is one more than this one's."""
    settings = recipe("s12").replace(averaging=0.9)
    module = lightning_loop.Classifier(models.build(settings, tiny_images()), settings)
    strategy = SimpleNamespace(reduce=lambda buffer, reduce_op: buffer + (reduce_op == "mean"))
    module.trainer = SimpleNamespace(strategy=strategy)
    module.on_validation_start()
    for network in (module.model, module.average):
        assert network.prep[1].running_mean.tolist() == 4 * [1.0]


def test_batch_that_can_not_be_shared(images):
    datamodule = as_process(lightning_loop.ImageDataModule(recipe("s12"), images), processes=3)
    with pytest.raises(InputError, match="multiple of 3"):
        datamodule.train_dataloader()


# What is refused


@pytest.mark.parametrize("arguments, words", [
    (["s10", "--devices", "2"], "--loop lightning"),
    (["s12", "--strategy", "nonsense"], "strategy"),
    (["s12", "--strategy", "ddp_spawn"], "choose --strategy ddp"),  # would keep its results
    (["s12", "--precision", "fp16"], "float16"),  # Lightning would take bfloat16 without a word
])
def test_bad_argument(folder, small_network, tmp_path, arguments, words):
    name, *flags = arguments
    with pytest.raises(SystemExit) as caught:
        train.main([name, "--data", str(folder), "--out", str(tmp_path / "new"), *SHORT, *flags])
    assert caught.value.code.startswith("error: ") and words in caught.value.code
    assert "\n" not in caught.value.code
    assert not (tmp_path / "new").exists()


def test_one_device_by_its_number_is_not_several(tmp_path):
    with pytest.raises(InputError, match="^cuda:1 is one device; "):
        lightning_loop.make_trainer(
            recipe("s12"), tmp_path, device=torch.device("cuda", 1), devices=2
        )


def test_several_processes_need_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="name it by --out"):
        train.main(["s12", "--data", str(folder), "--devices", "2", *SHORT])
