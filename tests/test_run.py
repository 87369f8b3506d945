"""A recipe on data into a folder: what a run writes, where to, and in which precision."""

import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import (
    CPU,
    CutOffError,
    Small,
    assert_same_state,
    cut_off_after,
    read_history,
    tiny_images,
    without_times,
)
from utils import InputError, data, devices, files, models, run, training, transforms
from utils.batches import evaluation_batches
from utils.models import load_weights
from utils.recipes import recipe
from utils.results import Results

OPTIONS = run.Options(data="tiny", device="cpu", precision="fp32")
SHORT = recipe("s10").scaled(epochs=2, batch_size=14).replace(padding=1, cutout=2)
LIGHTNING = SHORT.replace(loop="lightning")
SAVE_FIGURES = run.save_figures  # which most tests here leave out


def start(recipe=SHORT, *, images=None, **options):
    """As the command does it. Returns the folder."""
    options = replace(OPTIONS, **options)
    with run.output_folder(recipe, options) as out:
        run.run(recipe, images or tiny_images(), options, out)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(autouse=True)
def quick(small_network, monkeypatch):
    """All runs here are of the small network, and only the module's `out` has figures."""
    monkeypatch.setattr(run, "save_figures", lambda *_: [])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        return start(out=tmp_path_factory.mktemp("runs") / "first")


# What a run writes


def test_a_run_writes_these_files(out):
    figures = {"schedule", "loss", "accuracy", "per_class", "confusion"}
    if files.read_metrics(out)["last_epoch"]["test_acc"] < 100:
        figures.add("misclassified")
    others = {"checkpoint.pt", "history.csv", "metrics.json", "weights.safetensors"}
    assert contents(out).keys() == {f"{name}.png" for name in figures} | others
    for name in figures:
        with Image.open(out / f"{name}.png") as figure:
            figure.load()
            assert min(figure.size) > 100


def test_each_figure_is_called_what_it_shows(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(files, "save_figure", lambda figure, path: drawn.update({
        path.stem: figure.axes[0].get_xlabel() + " | " + figure.axes[0].get_ylabel()}))
    images, rows = tiny_images(), [{"epoch": 1, "train_acc": 50.0, "train_loss": 1.0}]
    results = Results(torch.randn(18, 3), images.test_labels, images.classes)
    SAVE_FIGURES(tmp_path, SHORT, images, results, rows)
    assert drawn == {
        "schedule": "epoch | learning rate", "loss": "epoch | loss",
        "accuracy": "epoch | accuracy, %", "per_class": "accuracy, % | ",
        "confusion": "predicted class | true class", "misclassified": " | ",
    }


@pytest.mark.parametrize("name, epochs, runs, expected", [
    ("CIFAR-10", 24, "one run", "s10 · one run of 24 epochs on CIFAR-10"),
    ("the folder cifar10", 1, "3 runs", "s10 · 3 runs of one epoch on the folder cifar10"),
])
def test_the_title_of_a_figure_says_of_which_runs_it_is(name, epochs, runs, expected):
    images = replace(tiny_images(), name=name)
    assert run.figure_title(recipe("s10").scaled(epochs=epochs), images, runs=runs) == expected


def test_metrics_say_how_the_run_was_made(out):
    images = tiny_images()
    mean, std = images.statistics
    last = read_history(out)[-1]
    assert last["epoch"] == 2
    metrics = files.read_metrics(out)
    assert metrics.pop("training_seconds") == sum(row["seconds"] for row in read_history(out)) > 0
    assert metrics.pop("versions").items() >= {
        "python": platform.python_version(), "torch": torch.__version__
    }.items()
    assert metrics == {
        "recipe": json.loads(SHORT.model_dump_json()),
        "seed": 0,
        "data": {
            "name": "tiny", "fingerprint": images.fingerprint,
            "mean": mean.tolist(), "std": std.tolist(),
        },
        "commit": run.current_commit(),
        "device": devices.device_name(CPU),
        "precision": "float32",
        "last_epoch": last,
    }


def test_weights_give_the_reported_accuracy_and_say_what_they_are_of(out):
    images, model = tiny_images(), load_weights(out / "weights.safetensors")
    batches = evaluation_batches(images, statistics=(model.mean, model.std), device=CPU)
    results, last = training.predict(model, batches), read_history(out)[-1]
    assert results.accuracy == last["test_acc"]
    assert results.loss == pytest.approx(last["test_loss"], rel=1e-5)
    pixels = images.train_images.double() / 255
    assert model.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert model.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-9)
    assert model.metadata == {
        "recipe": "s10", "seed": 0, "model": "custom_resnet", "fc_bias": True, "width": 64,
        "classes": ["a", "b", "c"], "size": [8, 8],
        "mean": list(model.mean), "std": list(model.std), "data": images.fingerprint,
    }


def test_a_run_says_what_it_does_and_what_came_out(tmp_path, capsys):
    start(out=tmp_path / "new")
    lines = capsys.readouterr().out.replace("\n" + 9 * " ", " ").splitlines()
    assert lines[0] == "data     tiny: 42 training and 18 test images of 8×8 pixels in 3 classes"
    assert lines[1].startswith("recipe   s10, epochs 2, ")
    assert lines[2].startswith("device   ") and lines[2].endswith(", float32")
    assert lines[3] == f"output   {tmp_path / 'new'}"
    accuracy = read_history(tmp_path / "new")[-1]["test_acc"]
    assert f"\ntest accuracy {accuracy:.2f} %, " in "\n".join(lines)


def test_same_seed_same_weights_other_seed_other_weights(out, tmp_path):
    again, other = (start(out=tmp_path / str(seed), seed=seed) for seed in (0, 1))
    name = "weights.safetensors"
    assert (again / name).read_bytes() == (out / name).read_bytes() != (other / name).read_bytes()


def test_the_seed_reaches_the_batches_too(monkeypatch):
    """With the same weights to begin with."""
    build = run.build
    monkeypatch.setattr(run, "build", lambda recipe, images, *, seed: build(recipe, images))
    weights = [
        run.train_plain(SHORT, tiny_images(), seed=seed, device=CPU)[0].fc.weight for seed in (0, 1)
    ]
    assert not torch.equal(*weights)


def test_validation_holds_out_training_images(tmp_path, capsys):
    """The test images stay unseen: exchanging them changes nothing."""
    images = tiny_images()
    first = start(images=images, out=tmp_path / "first", validate=True)
    assert "39 training and 3 test images" in capsys.readouterr().out
    changed = replace(images, test_images=255 - images.test_images)
    second = start(images=changed, out=tmp_path / "second", validate=True)
    assert files.read_metrics(first)["data"]["name"] == (
        "tiny, whose test images are held-out training images"
    )
    assert without_times(read_history(first)) == without_times(read_history(second))
    first, second = (load_weights(out / "weights.safetensors") for out in (first, second))
    assert_same_state(first, second)


def test_a_share_is_held_out_where_the_recipe_says_so(tmp_path, capsys):
    start(SHORT.replace(held_out=0.2), out=tmp_path / "new")
    assert "33 training, 9 validation and 18 test images" in capsys.readouterr().out


def test_resuming_a_finished_run_changes_no_results(out, tmp_path, monkeypatch):
    """Nor the commit that is noted: nothing was trained by today's."""
    mine = Path(shutil.copytree(out, tmp_path / "mine"))
    monkeypatch.setattr(run, "current_commit", lambda: "today's")
    start(out=mine, resume=True)
    before, after = contents(out), contents(mine)
    for name in ("weights.safetensors", "history.csv", "checkpoint.pt", "metrics.json"):
        assert after[name] == before[name]


def test_a_picture_that_fails_costs_no_run(tmp_path, monkeypatch):
    """All else is written by then, and `--resume` has only the pictures to draw."""
    def fail(*_):
        raise CutOffError

    monkeypatch.setattr(run, "save_figures", fail)
    with pytest.raises(CutOffError):
        start(out=tmp_path / "new")
    before = contents(tmp_path / "new")
    assert set(before) == {"checkpoint.pt", "history.csv", "metrics.json", "weights.safetensors"}
    monkeypatch.setattr(run, "save_figures", lambda *_: [])
    start(out=tmp_path / "new", resume=True)
    assert contents(tmp_path / "new") == before


def git(folder, *arguments):
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_commit(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # of a hook, perhaps: of the repository that it is in
    current_commit = run.current_commit.__wrapped__  # asked anew each time
    (tmp_path / "utils").mkdir()
    monkeypatch.setattr(run, "__file__", str(tmp_path / "utils" / "run.py"))
    assert current_commit() == ""
    git(tmp_path.parent, "init")
    git(tmp_path.parent, "commit", "--allow-empty", "-m", "of another repository")
    assert current_commit() == ""
    git(tmp_path, "init")
    (tmp_path / "run.py").write_text("one")
    git(tmp_path, "add", "run.py")
    git(tmp_path, "commit", "-m", "one")
    git(tmp_path, "tag", "a-name")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert current_commit() == commit != ""
    (tmp_path / "run.py").write_text("two")
    assert current_commit() == f"{commit}+"
    monkeypatch.setenv("PATH", "")
    assert current_commit() == ""


# Precision


@pytest.mark.parametrize("settings", [SHORT, LIGHTNING], ids=["plain", "lightning"])
def test_a_resumed_run_takes_the_precision_that_is_fast_here(
    settings, tmp_path, monkeypatch, capsys
):
    """It says so, and its metrics name both; a finished run keeps what it was made in."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # float32
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    out = tmp_path / "out"
    with cut_off_after(4):  # an epoch has three steps
        start(settings, out=out, precision="bf16")
    start(settings, out=out, resume=True, precision="auto")
    assert "\ngoes on in float32; it was bfloat16 so far\n" in capsys.readouterr().out
    assert files.read_metrics(out)["precision"] == "bfloat16, float32"
    before = contents(out)
    (out / "metrics.json").unlink()
    start(settings, out=out, resume=True, precision="bf16")
    assert "goes on" not in capsys.readouterr().out
    assert files.read_metrics(out)["precision"] == "bfloat16, float32"
    assert (out / "weights.safetensors").read_bytes() == before["weights.safetensors"]


# Output folders


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_run_takes_a_folder_of_its_own_and_says_which(here, capsys):
    kept = {}
    for name in ("s10-tiny-seed0", "s10-tiny-seed0-2", "s10-tiny-seed0-3"):
        path = Path("runs", name)
        assert start() == path
        assert f"output   {path}\n" in capsys.readouterr().out
        assert all(contents(old) == before for old, before in kept.items())
        kept[path] = contents(path)
    assert start(seed=7) == Path("runs/s10-tiny-seed7")
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "s10-tiny-seed0", "s10-tiny-seed0-2", "s10-tiny-seed0-3", "s10-tiny-seed7"
    ]


def test_resume_goes_on_in_the_newest_folder(here):
    first = start(resume=True)  # nothing is there yet
    before = contents(first)
    with cut_off_after(4):
        start()
    newest = Path("runs/s10-tiny-seed0-2")
    assert contents(newest).keys() == {"checkpoint.pt", "history.csv"}
    assert start(resume=True) == newest
    assert without_times(read_history(newest)) == without_times(read_history(first))
    assert contents(first) == before and len(list(Path("runs").iterdir())) == 2


def test_the_newest_folder_need_not_have_the_highest_number(here):
    for name, changed in (("s10-tiny-seed0", 5000), ("s10-tiny-seed0-2", 4000)):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        os.utime(folder, (changed, changed))
    with run.output_folder(SHORT, replace(OPTIONS, resume=True)) as out:
        assert out == Path("runs/s10-tiny-seed0")


@pytest.mark.parametrize("source", [".", "", "../colours/", "{}"])
def test_the_folder_is_called_after_the_folder_of_the_data(here, monkeypatch, source):
    (here / "colours").mkdir()
    monkeypatch.chdir(here / "colours")
    options = replace(OPTIONS, data=source.format(here / "colours"))
    with run.output_folder(SHORT, options) as out:
        assert out == Path("runs/s10-colours-seed0")


def refused(recipe, **options):
    """Why there is no folder for such a run."""
    options = replace(OPTIONS, **options)
    with pytest.raises(InputError) as caught, run.output_folder(recipe, options):
        raise AssertionError("a folder for what can't be run")
    return str(caught.value)


@pytest.mark.parametrize("options", [{"devices": 2}, {"num_nodes": 2}], ids=str)
def test_several_processes_need_a_named_folder(here, options):
    assert re.match("several processes need [^\n]*--out", refused(LIGHTNING, **options))
    with run.output_folder(LIGHTNING, replace(OPTIONS, out=Path("x"), **options)) as out:
        assert out == Path("x")


@pytest.mark.parametrize("settings", [SHORT, LIGHTNING], ids=["plain", "lightning"])
@pytest.mark.parametrize("started, options", [
    ("2", {}), ("1", {"devices": 2}), ("4", {"devices": 4, "num_nodes": 2}),
], ids=str)
def test_torchrun_and_the_command_must_agree(here, monkeypatch, settings, started, options):
    """Else each of its processes would train everything, alone, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", started)
    asked = options.get("devices", 1) * options.get("num_nodes", 1)
    message = refused(settings, out=Path("x"), **options)
    assert message == (
        f"--devices and --num-nodes ask for {asked} process(es), but WORLD_SIZE, which torchrun "
        f"sets, is {started}; make them agree"
    )
    assert list(here.iterdir()) == []


def test_two_runs_at_once_have_folders_of_their_own(here):
    named = replace(OPTIONS, out=Path("mine"))
    with run.output_folder(SHORT, OPTIONS) as first, run.output_folder(SHORT, OPTIONS) as second:
        assert (first, second) == (Path("runs/s10-tiny-seed0"), Path("runs/s10-tiny-seed0-2"))
    with run.output_folder(SHORT, named):
        assert refused(SHORT, out=Path("mine")).startswith("mine holds a run already; add --resume")
    assert list(here.iterdir()) == []  # nothing has come about


def test_of_many_commands_at_once_each_gets_another_folder(here):
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        folders = pool.map(
            lambda _: stack.enter_context(run.output_folder(SHORT, OPTIONS)), range(24)
        )
        assert len(set(folders)) == 24


@pytest.mark.parametrize("name", ["checkpoint.pt", "history.csv", "metrics.json"])
def test_a_finished_run_is_kept_whatever_of_it_was_deleted(out, tmp_path, name):
    mine = Path(shutil.copytree(out, tmp_path / "mine"))
    (mine / name).unlink()
    before = contents(mine)
    with pytest.raises(InputError, match="mine holds a run already; "):
        start(out=mine)
    assert contents(mine) == before


def test_a_folder_of_notes_can_be_used_again_after_a_failure(here):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(CutOffError), run.output_folder(SHORT, replace(OPTIONS, out=Path("mine"))):
        raise CutOffError
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]
    assert start(out=Path("mine")) == Path("mine")


def test_the_home_folder_is_meant_by_its_short_name(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    monkeypatch.setenv("USERPROFILE", str(here / "home"))
    with run.output_folder(SHORT, replace(OPTIONS, out=Path("~/mine"))) as out:
        assert out == here / "home" / "mine" and out.is_dir()


def test_a_name_that_is_too_long_is_refused_at_once(here):
    message = refused(SHORT, out=Path("x" * 300))
    assert re.fullmatch(r"x+ can't be written \([^\n]*\); [^\n]*another folder", message)


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_is_noticed_before_pictures_are_read(out, tmp_path, small_files, resume):
    mine = Path(shutil.copytree(out, tmp_path / "mine")) if resume else tmp_path / "mine"
    with small_files(1000):
        message = refused(SHORT, out=mine, resume=resume)
    assert "mine can't be written" in message and "\n" not in message


@pytest.mark.parametrize("name", ["mine", "mine/new", "mine/new/newer"])
def test_a_file_in_the_place_of_the_folder_is_left_alone(here, name):
    Path("mine").write_text("mine")
    with pytest.raises(InputError, match="^mine is a file; [^\n]*--out"):
        start(out=Path(name))
    assert Path("mine").read_text() == "mine"


@pytest.mark.parametrize("settings, checkpoint, options, words", [
    (SHORT, "checkpoint.pt", {}, "mine holds a run already; add --resume"),
    (LIGHTNING, "last.ckpt", {}, "mine holds a run already; add --resume"),
    (LIGHTNING, "checkpoint.pt", {"resume": True}, "mine holds a run .* add --loop plain"),
    (SHORT, "last.ckpt", {"resume": True}, "mine holds a run .* add --loop lightning"),
    (SHORT, "weights.safetensors", {"resume": True}, "mine holds a run .* name another --out"),
    (LIGHTNING, "metrics.json", {"resume": True}, "mine holds a run .* name another --out"),
    (SHORT, "checkpoint.pt", {"resume": True}, "checkpoint.pt can't be read .* damaged"),
    (LIGHTNING, "last.ckpt", {"resume": True}, "last.ckpt can't be read .* damaged"),
    (SHORT, "", {"devices": 2}, "--devices, .* need --loop lightning"),
    (SHORT, "", {"strategy": "ddp"}, "need --loop lightning"),
])
def test_a_folder_of_another_run_is_left_alone(here, settings, checkpoint, options, words):
    mine = Path("mine", checkpoint or "notes.txt")
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match=f"^[^\n]*{words}[^\n]*$"):
        start(settings, out=Path("mine"), **options)
    assert [path.name for path in here.rglob("*")] == ["mine", mine.name]
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("options, words", [
    ({"seed": -1}, "--seed must be .*-1"), ({"seed": 2**32}, "--seed must be .*4294967296"),
    ({"devices": 0}, "--devices"), ({"num_nodes": -1}, "--num-nodes"),
], ids=str)
def test_options_that_can_not_be(options, words):
    with pytest.raises(InputError, match=words):
        run.Options(**options)


# The real network


def test_the_real_network_learns_the_sample(monkeypatch):
    """Shrunk to 12×12 pixels, of which a linear model tells a quarter; seeds gave 78 to 81 %.

    With half the channels, which is enough for that.
    """
    monkeypatch.undo()
    images = data.builtin_sample()
    small = {
        name: transforms.resize(getattr(images, name).float(), 12).round().clamp(0, 255).byte()
        for name in ("train_images", "test_images")
    }
    settings = recipe("s10_cpu").scaled(epochs=3, batch_size=16, max_lr=0.1).replace(
        sizes=(), padding=1, cutout=0, label_smoothing=0.0, width=32
    )
    _, history = run.train_plain(settings, replace(images, **small), device=CPU)
    assert history[-1]["test_acc"] > 60
