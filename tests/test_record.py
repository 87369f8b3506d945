"""Runs that are trained, resumed, skipped and kept; the table that is made of them."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_evaluate import Small
from test_train import read_history, without_figures, write_folder

from utils import InputError, data, models, record, train
from utils.evaluate import evaluate
from utils.models import load_weights

CPU = torch.device("cpu")
COLUMNS = [
    "recipe", "changed", "seed", "epochs", "train_acc", "train_loss", "test_acc", "test_loss",
    "test_acc_flip", "test_acc_exact", "seconds", "device", "precision", "python", "torch",
    "torchvision", "commit", "data",
]
SHORT = ["--epochs", "1", "--batch-size", "8", "--precision", "fp32"]


def small_model(settings, images, *, seed=0):
    torch.manual_seed(seed)
    return Small(len(images.classes), fc_bias=settings.fc_bias)


@pytest.fixture(scope="module", autouse=True)
def small_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        patch.setattr(train, "new_model", small_model)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with pictures, and what three seeds on them leave; figures are only named."""
    root = tmp_path_factory.mktemp("course")
    write_folder(root / "colours", train=8, test=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(train, "save_figures", name_figures)
        record.main([*arguments(3), "--weights"])
    return root


def name_figures(out, *_):
    for name in ("loss.png", "accuracy.png"):
        (out / name).write_text(out.name)
    return []


def arguments(seeds, to="kept"):
    return ["s10", "--seeds", str(seeds), "--data", "colours", "--to", to, "--device", "cpu",
            *SHORT]


@pytest.fixture
def copy(root, tmp_path, monkeypatch):
    """The same, to change."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    without_figures(monkeypatch)
    return tmp_path


def out_of(root, seed):
    return root / "runs" / f"s10-colours-seed{seed}"


# Training and keeping


def test_files(root):
    names = {path.name for path in (root / "kept").iterdir()}
    histories = {f"history_seed{seed}.csv" for seed in range(3)}
    assert names == {"runs.csv", "loss.png", "accuracy.png", "weights.safetensors"} | histories
    assert {path.name for path in (root / "runs").iterdir()} == {
        f"s10-colours-seed{seed}" for seed in range(3)
    }


def test_rows_are_those_of_the_runs(root):
    rows = record.read_csv(root / "kept/runs.csv")
    images = data.load(str(root / "colours"))
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    for seed, row in enumerate(rows):
        out = out_of(root, seed)
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        assert list(row) == COLUMNS
        assert (row["recipe"], row["changed"], row["epochs"]) == ("s10", "batch_size=8", "1")
        for name in ("train_acc", "train_loss", "test_acc", "test_loss"):
            assert float(row[name]) == read_history(out)[-1][name]
        result = evaluate(
            load_weights(out / "weights.safetensors"), images.test_images, images.test_labels
        )
        assert float(row["test_acc"]) == float(row["test_acc_exact"]) == result["accuracy"]
        assert float(row["test_acc_flip"]) == result["accuracy_flip"]
        assert float(row["seconds"]) == metrics["training_seconds"]
        assert (row["device"], row["precision"]) == (metrics["device"], "float32")
        assert row["torch"] == torch.__version__
        assert row["commit"] == metrics["commit"] == train.current_commit()
        assert row["data"] == images.fingerprint
        kept = root / f"kept/history_seed{seed}.csv"
        assert kept.read_bytes() == (out / "history.csv").read_bytes()


@pytest.mark.parametrize("accuracies, median", [
    ([60.0], 0), ([60.0, 50.0], 1), ([60.0, 50.0, 70.0], 0), ([50.0, 70.0, 60.0], 2),
])
def test_figures_and_weights_are_the_median_runs(copy, accuracies, median):
    for seed, accuracy in enumerate(accuracies):
        metrics = record.read_metrics(out_of(copy, seed))
        metrics["last_epoch"]["test_acc"] = accuracy
        (out_of(copy, seed) / "metrics.json").write_text(json.dumps(metrics))
    outs = [out_of(copy, seed) for seed in range(len(accuracies))]
    record.record(
        "s10", outs[::-1], data.load("colours"), copy / "new", weights=True, device=CPU
    )
    rows = record.read_csv(copy / "new/runs.csv")
    assert [float(row["test_acc"]) for row in rows] == accuracies
    assert (copy / "new/loss.png").read_text() == outs[median].name
    kept = load_weights(copy / "new/weights.safetensors")
    run = load_weights(outs[median] / "weights.safetensors")
    assert kept.metadata == run.metadata and kept.metadata["seed"] == median
    assert torch.equal(kept.fc.weight, run.fc.weight.half().float())
    assert load_file(copy / "new/weights.safetensors")["fc.weight"].dtype == torch.float16


def test_accuracy_of_all_runs_is_drawn(root):
    with Image.open(root / "kept/accuracy.png") as figure:
        figure.load()
        assert min(figure.size) > 100


def test_finished_runs_are_left_and_others_go_on(copy, monkeypatch):
    """Seed 0 is done; of seed 1 only the checkpoint is there; seed 2 has not begun."""
    before = (copy / "kept/runs.csv").read_text().splitlines()
    for path in out_of(copy, 1).iterdir():
        if path.name != "checkpoint.pt":
            path.unlink()
    shutil.rmtree(out_of(copy, 2))
    history = torch.load(out_of(copy, 1) / "checkpoint.pt", weights_only=True)["history"]
    trained = []
    run = train.run
    monkeypatch.setattr(train, "run", lambda a, images: (trained.append(a.seed), run(a, images)))
    record.main(arguments(3))
    assert trained == [1, 2]
    assert read_history(out_of(copy, 1)) == history  # its seconds are those of the first start
    after = (copy / "kept/runs.csv").read_text().splitlines()
    assert after[:2] == before[:2] and len(after) == 4
    ours, theirs = (line.split(",") for line in (after[2], before[2]))
    commit = COLUMNS.index("commit")
    assert ours[:commit] == theirs[:commit]


def test_fewer_runs_leave_nothing_of_the_others(copy):
    record.main(["s10", "--from", str(out_of(copy, 2)), "--data", "colours", "--to", "kept",
                 "--device", "cpu"])
    assert [row["seed"] for row in record.read_csv(copy / "kept/runs.csv")] == ["2"]
    assert [path.name for path in (copy / "kept").glob("history*")] == ["history_seed2.csv"]
    # of a single run the curves are its own
    assert (copy / "kept/accuracy.png").read_text() == "s10-colours-seed2"


def test_left_out_images_and_old_metrics(copy, monkeypatch):
    """metrics.json of older runs lacks the commit, and mean and std; `record` works without."""
    images = data.load("colours")
    model = load_weights(out_of(copy, 0) / "weights.safetensors")
    result = evaluate(model, images.test_images, images.test_labels)
    names = data.fingerprints(images.test_images)
    (copy / "list").write_text("\n".join(names[:10]))  # blue, and three green
    monkeypatch.setattr(record, "INEXACT", copy / "list")
    metrics = record.read_metrics(out_of(copy, 0))
    del metrics["commit"], metrics["data"]["mean"], metrics["data"]["std"]
    del metrics["recipe"]["sizes"]
    (out_of(copy, 0) / "metrics.json").write_text(json.dumps(metrics))
    record.record("s10", [out_of(copy, 0)], images, copy / "new", device=CPU)
    (row,) = record.read_csv(copy / "new/runs.csv")
    assert row["commit"] == "" and float(row["test_acc"]) == result["accuracy"]
    exact = evaluate(model, images.test_images[10:], images.test_labels[10:])["accuracy"]
    assert float(row["test_acc_exact"]) == exact
    assert not (copy / "new/weights.safetensors").exists()


# What is refused


@pytest.mark.parametrize("arguments, words", [
    (["s11", "--seeds", "1"], ["'s11'"]),
    (["s10", "--seeds", "1", "--seed", "3"], ["--seed "]),
    (["s10", "--seeds", "1", "--validate"], ["--validate"]),
    (["s10", "--seeds", "1", "--out", "x"], ["--out"]),
    (["s10", "--seeds", "1", "--loop", "lightning", "--devices", "2"], ["--devices"]),
    (["s10", "--seeds", "1", "--set", "cutout=x"], ["cutout"]),
    (["s10", "--seeds", "1", "--set", "cutout=0", *SHORT], ["seed0", "cutout=8"]),
    (["s10", "--from", "nowhere"], ["nowhere"]),
    (["s12", "--from", "runs/s10-colours-seed0"], ["s10", "s12"]),
    (["s10", "--from", "runs/s10-colours-seed0", "runs/s10-colours-seed0"], ["[0, 0]"]),
    (["s10", "--from", "runs/s10-colours-seed0", "--data", "sample"], ["other data"]),
], ids=" ".join)
def test_refused(copy, arguments, words):
    before = sorted(copy.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        record.main([*arguments[:1], "--data", "colours", "--to", "new", "--device", "cpu",
                     *arguments[1:]])
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert sorted(copy.rglob("*")) == before


def test_runs_with_other_settings_are_not_mixed(copy):
    metrics = record.read_metrics(out_of(copy, 1))
    metrics["recipe"]["cutout"] = 0
    (out_of(copy, 1) / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(InputError, match="seed1 differs from .*seed0 in settings"):
        record.record(
            "s10", [out_of(copy, 0), out_of(copy, 1)], data.load("colours"), copy / "new",
            device=CPU,
        )


@pytest.mark.parametrize("arguments", [[], ["s10"], ["s10", "--seeds", "0"],
                                       ["--table", "--epochs", "3"]], ids=str)
def test_incomplete_command(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        record.main(arguments)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


# The table

RUN = {
    "recipe": "s10", "changed": "", "epochs": "24", "train_acc": "98.5", "test_acc": "93",
    "test_acc_flip": "93.5", "test_acc_exact": "93.25", "seconds": "90", "device": "A",
    "precision": "float32",
}


def write_runs(folder, *runs):
    (folder / runs[0]["recipe"]).mkdir()
    record.training.write_csv(runs, folder / runs[0]["recipe"] / "runs.csv")


def test_table(tmp_path):
    write_runs(tmp_path, {**RUN, "recipe": "s12", "epochs": "5", "changed": "cutout=0",
                          "seconds": "3000"})
    write_runs(tmp_path, RUN, {**RUN, "test_acc": "94", "train_acc": "98.6", "seconds": "100.4",
                               "device": "B"})
    assert record.results_table(tmp_path).splitlines()[2:] == [
        "| `s10` | 98.60, 93.07 | 93.50 ± 0.71 (n = 2) | 93.25 ± 0.00 | 93.50 ± 0.00 "
        "| 98.55 ± 0.07 | 24 | 95.2 s | A, float32; B, float32 |",
        "| `s12` cutout=0 | – | 93.00 (n = 1) | 93.25 | 93.50 | 98.50 | 5 of 24 | 50 min "
        "| A, float32 |",
    ]
    first, second = record.results_table(tmp_path).splitlines()[:2]
    assert first.count("|") == second.count("|") == 10


def test_tables_replace_the_old_ones_alone(tmp_path, monkeypatch):
    tables = {"first": lambda: "| a |\n", "second": lambda: "| b |\n"}
    monkeypatch.setattr(record, "TABLES", tables)
    readme = tmp_path / "README.md"
    marks = [
        (f"<!-- {name}: python -m utils.record --table -->\n", f"<!-- end of {name} -->\n")
        for name in tables
    ]
    old = "# Ä\n{}old\n{}between\n{}{}rest\n".format(*marks[0], *marks[1])
    readme.write_text(old, encoding="utf-8")
    new = "# Ä\n{}\n| a |\n\n{}between\n{}\n| b |\n\n{}rest\n"
    expected = new.format(*marks[0], *marks[1])
    for _ in range(2):
        record.write_tables(readme)
        assert readme.read_text(encoding="utf-8") == expected


def test_no_place_for_a_table(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(InputError, match=r"README lacks the lines <!-- results"):
        record.write_tables(tmp_path / "README.md")


def test_speeds_table(tmp_path):
    rows = [
        {"device": "D", "what": "a", "unit": "images/s", "median": 1234.6, "lowest": 1.0,
         "highest": 2000},
        {"device": "D", "what": "b", "unit": "times", "median": 20.126, "lowest": 2, "highest": 3},
    ]
    record.training.write_csv(rows, tmp_path / "speeds.csv")
    assert record.speeds_table(tmp_path / "speeds.csv").splitlines() == [
        "| on D | median | lowest | highest | |",
        "|---|---:|---:|---:|---|",
        "| a | 1,235 | 1 | 2,000 | images/s |",
        "| b | 20.13 | 2.00 | 3.00 | times |",
    ]


# What was tried


def test_tuning_keeps_trials_on_held_out_images(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    without_figures(monkeypatch)
    for out, change in (("same", []), ("other", ["--set", "cutout=4", "--set", "sizes=(8, 16)"])):
        train.main(["s10", "--data", "colours", "--device", "cpu", "--validate", *SHORT, *change,
                    "--out", str(tmp_path / out)])
    record.main(["s10", "--tuning", str(tmp_path / "same"), str(tmp_path / "other"),
                 "--to", str(tmp_path / "s10")])
    first, second = record.read_csv(tmp_path / "s10" / "tuning.csv")
    assert "cutout" not in first["changed"]
    assert second["changed"].split("; ") == ["batch_size=8", "cutout=4", "sizes=[8, 16]"]
    assert second["data"] == "the folder colours" and second["epochs"] == "1"
    (history,) = read_history(tmp_path / "other")
    assert float(second["validation_acc"]) == history["test_acc"]
    row = record.tuning_table("s10", tmp_path).splitlines()[3]
    assert row == (
        "| `batch_size=8`, `cutout=4`, `sizes=[8, 16]` | the folder colours | 1 | "
        f"{history['train_acc']:.2f} | {history['test_acc']:.2f} | 0 min |"
    )


def test_tuning_refuses_a_run_that_saw_the_test_images(root, tmp_path):
    run = root / "runs" / "s10-colours-seed0"
    with pytest.raises(InputError, match="--validate"):
        record.write_tuning("s10", [run], tmp_path / "tuning.csv")
    assert not (tmp_path / "tuning.csv").exists()
