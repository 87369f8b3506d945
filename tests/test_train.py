"""The command line: what it asks for, what it refuses, how it ends, and a run that was killed."""

import io
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ON_CPU, read_history, tiny_images, without_times, write_folder
from utils import InputError, data, files, run, train
from utils.recipes import ABOUT_THE_SOURCE, RECIPES, Recipe, recipe

S10, RESNET9 = recipe("s10"), recipe("resnet9")
SAMPLE = replace(tiny_images(), epochs=6, batch_size=32)  # as the built-in sample wants it


@pytest.fixture
def asked(monkeypatch):
    """What the command asks `run.run` for, which does nothing: a list."""
    calls = []
    sources = {"sample": SAMPLE, "cifar10": tiny_images()}
    monkeypatch.setattr(data, "load", lambda source, resize: sources[source])
    monkeypatch.setattr(run, "run", lambda *arguments: calls.append(arguments))
    return calls


def stopped(*arguments):
    """The exit of a command that is refused or interrupted."""
    with pytest.raises(SystemExit) as caught:
        train.main([str(argument) for argument in arguments])
    return caught.value.code


def plain(text):
    """Without the frame that a message or the help is printed in."""
    return " ".join(re.sub("[│╭╮╰╯─|+]|-{3,}", " ", text).split())


# What it asks for


def test_every_setting_of_a_recipe_is_a_flag_and_explained(capsys):
    assert stopped("--help") == 0
    text = plain(capsys.readouterr().out)
    for name, field in Recipe.model_fields.items():
        flag = f" --{name.replace('_', '-')}"
        if name in {"name", *ABOUT_THE_SOURCE}:
            assert not re.search(rf"{flag}[ ,]", text)
        else:
            explained = re.escape(plain(field.description))
            values = r"(, --no\S+)?( \S+){0,3}"
            assert re.search(f"{flag}{values} {explained} \\(default: the", text), name


@pytest.mark.parametrize("arguments, expected", [
    ("s10", S10),
    ("s10 --weight-decay 5e-4 --cutout 0", S10.replace(weight_decay=5e-4, cutout=0)),
    ("s10 --epochs 12", S10.replace(epochs=12, peak_epoch=2.5)),
    ("s10 --epochs 12 --peak-epoch 3", S10.replace(epochs=12, peak_epoch=3)),
    ("s10 --batch-size 64", S10.replace(batch_size=64)),
    ("s10 --max-lr 0.02", S10.replace(max_lr=0.02, min_lr=2e-4)),
    ("s10 --max-lr 0.02 --min-lr 0.001", S10.replace(max_lr=0.02, min_lr=0.001)),
    ("s10 --no-fc-bias --sizes 16 32 --optimizer sgd --logit-scale 0.5 --loop lightning",
     S10.replace(fc_bias=False, sizes=(16, 32), optimizer="sgd", logit_scale=0.5,
                 loop="lightning")),
    ("resnet9 --gradient-clip None --final-lr 1e-5",
     RESNET9.replace(gradient_clip=None, final_lr=1e-5)),
    ("resnet9_published", recipe("resnet9_published")),
    ("resnet9_published --epochs 4 --peak-epoch 2",
     recipe("resnet9_published").replace(epochs=4, peak_epoch=2)),
    ("s10_albumentations_published --weight-decay 0",
     recipe("s10_albumentations_published").replace(weight_decay=0)),
    ("s10 --data sample", S10.replace(epochs=6, batch_size=32, peak_epoch=1.25)),
    ("s10 --data sample --batch-size 16",
     S10.replace(epochs=6, batch_size=16, peak_epoch=1.25)),
    ("s10 --data sample --epochs 2 --peak-epoch 1",
     S10.replace(epochs=2, batch_size=32, peak_epoch=1)),
])
def test_the_recipe_that_is_asked_for(asked, tmp_path, arguments, expected):
    train.main([*arguments.split(), "--out", str(tmp_path / "new")])
    [[chosen, images, _, out]] = asked
    assert chosen.settings() == expected.settings()
    assert images.epochs == (6 if "sample" in arguments else None)
    assert out == tmp_path / "new"


def test_how_and_where_is_passed_on(asked, tmp_path):
    train.main([
        "s12", "--seed", "7", *ON_CPU, "--out", str(tmp_path / "new"), "--resume", "--validate",
        "--devices", "2", "--num-nodes", "3", "--strategy", "ddp", "--data", "sample",
        "--resize", "48",
    ])
    options = {name: getattr(asked[0][2], name) for name in run.Options.__dataclass_fields__}
    assert options == {
        "data": "sample", "resize": 48, "seed": 7, "device": "cpu", "precision": "fp32",
        "out": tmp_path / "new", "resume": True, "validate": True, "devices": 2, "num_nodes": 3,
        "strategy": "ddp",
    }


# What it refuses


@pytest.mark.parametrize("arguments, words", [
    ("s11", ["s11", *RECIPES]),
    ("s10 --epochs 0", ["epochs", "0"]),
    ("s10 --epochs x", ["--epochs", "'x'"]),
    ("s10 --epochs 5 --peak-epoch 5", ["peak_epoch", "5 epochs"]),
    ("s10 --cutout -1", ["cutout", "-1"]),
    ("s10 --flip 2", ["flip", "1", "2"]),
    ("s10 --max-lr -1", ["max_lr", "-1"]),
    ("s10 --max-lr 0", ["max_lr", "0"]),
    ("s10 --sizes 16 --per-image", ["sizes", "per_image"]),
    ("s10 --logit-scale 0.5", ["logit_scale", "sgd"]),
    ("s10 --model resnet", ["--model", "resnet", "resnet9"]),
    ("s10 --set cutout=0", ["--set"]),
    ("s10 --seed -1", ["--seed", "-1"]),
    ("s10 --seed 4294967296", ["--seed", "4294967296"]),
    ("s10 --precision fp8", ["--precision", "fp8", "bf16"]),
    ("s10 --loop lightning --devices 0", ["--devices"]),
    ("s10 --devices 2", ["--devices", "--loop lightning"]),
    ("s10 --device cuda:99", ["cuda:99"]),
    ("s10 --device nonsense", ["nonsense"]),
    ("s10 --data nowhere", ["nowhere"]),
])
def test_a_bad_argument_ends_with_a_short_message(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(Path("colours"), train=1, test=1, side=8)
    name, *flags = arguments.split()
    code = stopped(name, "--data", "colours", "--out", "new", *flags)
    message = code if isinstance(code, str) else plain(capsys.readouterr().err)
    assert code and all(word in message for word in words), message
    assert len(message) < 400 and "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["colours"]


def test_pictures_that_can_not_be_used_are_named_in_one_line(tmp_path):
    broken = write_folder(tmp_path / "broken", train=1, test=1) / "test" / "red" / "000.png"
    broken.write_bytes(broken.read_bytes()[:100])
    write_folder(tmp_path / "small", train=1, test=1, side=7)
    write_folder(tmp_path / "few", train=2, test=1)
    for name, words, *arguments in (
        ("broken", str(broken)),
        ("small", "7×7", "--cutout", 2, "--padding", 1),
        ("few", "the folder few has too few", "--validate"),
    ):
        out = tmp_path / "new"
        code = stopped("s10", "--data", tmp_path / name, "--out", out, *arguments, *ON_CPU)
        assert code.startswith("error: ") and words in code and "\n" not in code
        assert not out.exists()


# How it ends


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), r"\ninterrupted; [^\n]*--resume[^\n]*"),
    (InputError("lower it"), "error: lower it"),
    (OSError("the share is gone"), "error: the share is gone"),
    (torch.OutOfMemoryError("CUDA out of memory. …"), "error: the GPU [^\n]*--batch-size[^\n]*"),
], ids=["interrupt", "error", "system", "memory"])
@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"])
@pytest.mark.parametrize("processes", [1, 2])
def test_only_the_first_process_speaks(
    asked, monkeypatch, tmp_path, capsys, error, words, variable, processes
):
    """A single one always does: something else has set the variable."""
    def stop(*_):
        print("a table")
        raise error

    monkeypatch.setattr(run, "run", stop)
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        command = ["s10", "--loop", "lightning", "--devices", processes, "--out", tmp_path]
        code, output = stopped(*command), capsys.readouterr()
        if rank == "0" or processes == 1:
            assert re.fullmatch(words, code) and output.out == "a table\n"
        else:
            assert code == 1 and output.out + output.err == ""


def test_what_the_encoding_lacks_stops_no_command():
    written = io.BytesIO()
    with io.TextIOWrapper(written, "ascii") as stream:
        print("8×8 pixels → ok \udcff", file=train.Output(stream), flush=True)
        assert written.getvalue() == b"8?8 pixels ? ok ?\n"


def test_a_reader_that_has_gone_stops_no_command():
    """As `head` does in `python -m utils.train s10 | head -2`."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        output = train.Output(stream)
        print("first", file=output, flush=True)
        assert os.read(reader, 9) == b"first\n"
        os.close(reader)
        print("second", file=output, flush=True)
        print("third", file=output, flush=True)


@pytest.mark.filterwarnings("ignore:'utils.train' found in sys.modules")
def test_a_refusal_is_one_line_and_a_status(tmp_path, monkeypatch, capfd):
    """As by `python -m`, but in this process: sys.exit of a text prints it and gives status 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "s10", "--data", "x"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("utils.train", run_name="__main__")
    assert caught.value.code.startswith("error: can't read x") and "\n" not in caught.value.code
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# Real processes


def start(folder, *command):
    """Runs Python in `folder`, which is not the repository's."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, timeout=300,
        capture_output=True, text=True, encoding="utf-8",
    )


KILLED = """
import os, signal, sys
from utils import train, training

step, steps = training.training_step, []

def training_step(*args, **settings):
    steps.append(1)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **settings)

training.training_step = training_step
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch, no_figures):
    """In the second of two epochs of three steps; in a folder of one's own, unnamed."""
    write_folder(tmp_path / "colours", train=8, test=3, side=8)
    command = ["s10", "--data", "colours", "--epochs", 2, "--batch-size", 8, "--padding", 1,
               "--cutout", 2, "--width", 8, *ON_CPU]
    (tmp_path / "killed.py").write_text(KILLED)
    process = start(tmp_path, "killed.py", *command)
    assert process.returncode == -signal.SIGKILL, process.stderr
    out = tmp_path / "runs" / "s10-colours-seed0"
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "history.csv"}
    assert len(files.read_checkpoint(out / "checkpoint.pt")["history"]) == 1

    process = start(tmp_path, "-m", "utils.train", *command, "--resume")
    assert process.returncode == 0, process.stderr
    monkeypatch.chdir(tmp_path)
    train.main([*map(str, command), "--out", "whole"])
    weights = "weights.safetensors"
    assert (out / weights).read_bytes() == Path("whole", weights).read_bytes()
    assert without_times(read_history(out)) == without_times(read_history(Path("whole")))
    assert {path.name for path in out.iterdir()} >= {path.name for path in Path("whole").iterdir()}
    assert [path.name for path in Path("runs").iterdir()] == [out.name]
