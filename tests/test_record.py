"""Runs that are trained, resumed, skipped and kept, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import CPU, ON_CPU, read_history, write_folder
from utils import InputError, data, devices, explain, files, run, train
from utils.maintenance import record, tables
from utils.models import load_weights
from utils.results import read_predictions

COLUMNS = [
    "recipe", "changed", "seed", "epochs", "train_acc", "seconds", "device", "precision",
    "train_loss", "test_acc", "test_loss", "test_acc_flip", "python", "torch", "torchvision",
    "commit", "data",
]
SHORT = ["--epochs", "1", "--batch-size", "8", "--cutout", "2"]
# metrics.json as it was before a run's recipe had its claims as a dict.
OLD = {
    "recipe": {
        "name": "s10", "model": "custom_resnet", "fc_bias": True, "epochs": 1,
        "peak_epoch": 0.20833333333333334, "batch_size": 8, "optimizer": "adamw", "min_lr": 0.0001,
        "max_lr": 0.01, "final_lr": None, "anneal": "linear", "cycle_momentum": False,
        "weight_decay": 0.2, "label_smoothing": 0.0, "gradient_clip": None, "padding": 4,
        "padding_mode": "constant", "flip": 0.5, "cutout": 2, "logit_scale": 1.0, "dirac": False,
        "whiten": False, "per_image": False,
        "claimed": [["train", 98.6], ["test", 93.07]], "original": [["epochs", 8]],
    },
    "seed": 0,
    "versions": {"python": "3.11.7", "torch": "2.7.0", "torchvision": "0.22.0"},
    "device": "an old CPU", "precision": "float32", "training_seconds": 3.5,
    "warm_up_seconds": 0.0,
}

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pictures, and what three seeds on them leave; figures are only named."""
    root = tmp_path_factory.mktemp("course")
    write_folder(root / "colours", train=8, test=7, side=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(run, "save_figures", name_figures)
        outs = [str(out_of(root, seed)) for seed in range(3)]
        for seed, out in enumerate(outs):
            train.main(["s10", "--data", "colours", "--seed", str(seed), "--out", out, *ON_CPU,
                        *SHORT])
        record.main(["s10", "--from", *outs, "--data", "colours", "--to", "kept", "--weights",
                     "--device", "cpu"])
    return root


def name_figures(out, *_):
    for name in ("loss.png", "accuracy.png"):
        (out / name).write_text(out.name)
    return []


@pytest.fixture
def copy(root, tmp_path, monkeypatch, no_figures):
    """The same, to change."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def images(root):
    return data.load(str(root / "colours"))


def out_of(root, seed):
    return root / "runs" / f"s10-colours-seed{seed}"


def change_metrics(out, change):
    metrics = files.read_metrics(out)
    change(metrics)
    (out / "metrics.json").write_text(json.dumps(metrics))


# Training and keeping


def test_files(root):
    names = {path.name for path in (root / "kept").iterdir()}
    histories = {f"history_seed{seed}.csv" for seed in range(3)}
    tensors = {"weights.safetensors", "predictions.safetensors"}
    assert names == {"runs.csv", "loss.png", "accuracy.png"} | tensors | histories
    assert {path.name for path in (root / "runs").iterdir()} == {
        f"s10-colours-seed{seed}" for seed in range(3)
    }
    with Image.open(root / "kept/accuracy.png") as figure:  # of all runs, not the median's
        assert min(figure.size) > 100


def test_rows_are_those_of_the_runs(root, images):
    rows = files.read_table(root / "kept/runs.csv")
    assert list(rows) == COLUMNS and list(rows["seed"]) == [0, 1, 2]
    for seed, row in enumerate(rows.to_dict("records")):
        out = out_of(root, seed)
        metrics, last = files.read_metrics(out), read_history(out)[-1]
        model = load_weights(out / "weights.safetensors")
        plain, flipped = explain.plain_and_flipped(model, images)
        assert row == {
            "recipe": "s10", "changed": "batch_size=8; cutout=2", "seed": seed, "epochs": 1,
            **{name: last[name] for name in ("train_acc", "train_loss", "test_acc", "test_loss")},
            "test_acc_flip": flipped.accuracy, "seconds": metrics["training_seconds"],
            "device": metrics["device"], "precision": "float32", **metrics["versions"],
            "commit": run.current_commit(), "data": images.fingerprint,
        }
        assert row["test_acc"] == plain.accuracy and row["torch"] == torch.__version__
        kept = root / f"kept/history_seed{seed}.csv"
        assert kept.read_bytes() == (out / "history.csv").read_bytes()


@pytest.mark.parametrize("accuracies, median", [
    ([60.0], 0), ([60.0, 50.0], 1), ([60.0, 50.0, 70.0], 0), ([50.0, 70.0, 60.0], 2),
])
def test_figures_and_weights_are_the_median_runs(copy, images, accuracies, median, monkeypatch):
    for seed, accuracy in enumerate(accuracies):
        change_metrics(out_of(copy, seed), lambda m, a=accuracy: m["last_epoch"].update(test_acc=a))
    monkeypatch.setattr(
        explain, "plain_and_flipped",
        lambda model, *_, **__: 2 * [SimpleNamespace(accuracy=accuracies[model.metadata["seed"]])],
    )
    outs = [out_of(copy, seed) for seed in range(len(accuracies))]
    record.record_runs("s10", outs[::-1], images, copy / "new", weights=True, device=CPU)
    assert list(files.read_table(copy / "new/runs.csv")["test_acc"]) == accuracies
    assert (copy / "new/loss.png").read_text() == outs[median].name
    kept = load_weights(copy / "new/weights.safetensors")
    original = load_weights(outs[median] / "weights.safetensors")
    assert kept.metadata == original.metadata and kept.metadata["seed"] == median
    assert torch.equal(kept.fc.weight, original.fc.weight.half().float())
    assert load_file(copy / "new/weights.safetensors")["fc.weight"].dtype == torch.float16
    monkeypatch.undo()
    predicted, _ = explain.plain_and_flipped(kept, images)
    order = images.test_labels.argsort(stable=True)
    found = read_predictions(copy / "new/predictions.safetensors")
    torch.testing.assert_close(found.logits, predicted.logits[order].half().float())


def test_weights_are_evaluated_in_float32_on_every_machine(copy, images, monkeypatch):
    """Else what is recorded would depend on whether this one is fast in the run's precision."""
    asked = []
    monkeypatch.setattr(devices, "amp_dtype", lambda device: torch.bfloat16)
    asks = explain.plain_and_flipped
    monkeypatch.setattr(
        explain, "plain_and_flipped",
        lambda *args, dtype=None: asked.append(dtype) or asks(*args, dtype=dtype),
    )
    change_metrics(out_of(copy, 0), lambda m: m.update(precision="bfloat16"))
    record.record_runs("s10", [out_of(copy, 0)], images, copy / "new", device=CPU)
    assert asked == [None]
    assert list(files.read_table(copy / "new/runs.csv")["precision"]) == ["bfloat16"]


def test_the_figure_of_several_runs_says_how_many(copy, monkeypatch):
    titles = []
    monkeypatch.setattr(files, "save_figure", lambda figure, _: titles.append(
        figure.get_suptitle()
    ))
    outs = [str(out_of(copy, seed)) for seed in range(3)]
    record.main(["s10", "--from", *outs, "--data", "colours", "--to", "new", "--device", "cpu"])
    assert titles == ["s10 · 3 runs of one epoch on the folder colours"]


def test_logs_are_kept_and_older_ones_are_not(copy, images):
    (copy / "new/csv").mkdir(parents=True)
    (copy / "new/csv/older.csv").write_text("")
    (out_of(copy, 0) / "tensorboard").mkdir()
    (out_of(copy, 0) / "tensorboard/events").write_text("curves")
    record.record_runs("s10", [out_of(copy, 0)], images, copy / "new", device=CPU)
    assert (copy / "new/tensorboard/events").read_text() == "curves"
    assert not (copy / "new/csv").exists()


def test_fewer_runs_leave_nothing_of_the_others(copy):
    record.main(["s10", "--from", str(out_of(copy, 2)), "--data", "colours", "--to", "kept",
                 "--device", "cpu"])
    assert list(files.read_table(copy / "kept/runs.csv")["seed"]) == [2]
    assert [path.name for path in (copy / "kept").glob("history*")] == ["history_seed2.csv"]
    assert not list((copy / "kept").glob("*.safetensors"))
    # of a single run the curves are its own
    assert (copy / "kept/accuracy.png").read_text() == "s10-colours-seed2"


def test_without_a_folder_it_is_that_of_the_recipe_and_the_readme_follows(copy, monkeypatch):
    written = []
    monkeypatch.setattr(tables, "IMAGES", copy / "images")
    monkeypatch.setattr(tables, "write", lambda: written.append("README.md"))
    record.main(["s10", "--from", str(out_of(copy, 1)), "--data", "colours", "--device", "cpu"])
    assert list(files.read_table(copy / "images/s10/runs.csv")["seed"]) == [1]
    assert written == ["README.md"]


def test_run_of_an_older_version(copy, images):
    """It lacks settings that it did not know, its commit, and mean and deviation."""
    out = out_of(copy, 0)
    last = read_history(out)[-1]
    about = {"name": "the folder colours", "fingerprint": images.fingerprint}
    old = {**OLD, "data": about, "last_epoch": last}
    (out / "metrics.json").write_text(json.dumps(old))
    record.record_runs("s10", [out, out_of(copy, 1)], images, copy / "new", device=CPU)
    row, _ = files.read_table(copy / "new/runs.csv").to_dict("records")
    assert (row["changed"], row["commit"]) == ("batch_size=8; cutout=2", "")
    assert (row["test_acc"], row["seconds"], row["torch"]) == (last["test_acc"], 3.5, "2.7.0")


# What is refused


@pytest.mark.parametrize("arguments, words", [
    (["s10"], ["--from", "--tuning"]),
    (["s10", "--from", "runs/s10-colours-seed0", "--tuning", "nowhere"], ["either"]),
    (["s10", "--from", "nowhere"], ["nowhere"]),
    (["s12", "--from", "runs/s10-colours-seed0"], ["s10", "s12"]),
    (["s10", "--from", "runs/s10-colours-seed0", "runs/s10-colours-seed0"], ["[0, 0]"]),
    (["s10", "--from", "runs/s10-colours-seed0", "--data", "sample"], ["other data"]),
    (["s10", "--tuning", "runs/s10-colours-seed0"], ["--validate"]),
], ids=" ".join)
def test_refused(copy, arguments, words):
    before = sorted(copy.rglob("*"))
    name, *flags = arguments
    with pytest.raises(SystemExit) as caught:
        record.main([name, "--data", "colours", "--to", "new", "--device", "cpu", *flags])
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("change, words", [
    (lambda metrics: metrics["recipe"].update(cutout=0), "seed1 differs from .*seed0 in sett"),
    (lambda metrics: metrics.update(precision="bfloat16"), "seed1 differs from .*seed0 in sett"),
    (lambda metrics: metrics["last_epoch"].update(test_acc=99.0), "seed1 notes .* 99.00, its weig"),
], ids=["settings", "precision", "accuracy"])
def test_runs_that_do_not_belong_together(copy, images, change, words):
    change_metrics(out_of(copy, 1), change)
    with pytest.raises(InputError, match=words):
        outs = [out_of(copy, 0), out_of(copy, 1)]
        record.record_runs("s10", outs, images, copy / "new", device=CPU)
    assert not (copy / "new").exists()


# What was tried


def test_tuning_keeps_trials_on_held_out_images(copy):
    for out, change in (("same", []), ("other", ["--cutout", "4", "--sizes", "8", "8"])):
        train.main(["s10", "--data", "colours", *SHORT, *ON_CPU, "--validate", *change,
                    "--out", out])
    how = ["--data", "colours", "--device", "cpu", "--to", "s10"]
    record.main(["s10", "--tuning", "same", "other", *how])
    first, second = files.read_table(copy / "s10" / "tuning.csv").to_dict("records")
    assert first["changed"] == "batch_size=8; cutout=2"
    assert second["changed"] == "batch_size=8; cutout=4; sizes=[8, 8]"
    (history,) = read_history(copy / "other")
    assert second["validation_acc"] == history["test_acc"]
    model = load_weights(copy / "other" / "weights.safetensors")
    held_out = data.hold_out(data.load("colours"))
    assert second["validation_acc_flip"] == explain.plain_and_flipped(model, held_out)[1].accuracy
