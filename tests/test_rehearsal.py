"""Whole runs on GPUs that are not there, where what a real one would refuse is refused.

Kinds of GPU that learners have: in Colab a T4, which computes in float16, or an A100 in bfloat16;
an Apple GPU in float32. No device is at hand where these tests run: see `pretend_gpu`.
"""

import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import Reader, assert_same_state, cut_off_after, read_history, tiny_images
from tests.pretend_gpu import pretend, waits
from utils import data, devices, evaluate, explain, files, notebook, plotting, run, training
from utils.batches import training_batches
from utils.maintenance import benchmark
from utils.models import build, load_weights
from utils.optimization import lr_range_test, make_optimizer
from utils.recipes import recipe

ROOT = Path(__file__).parents[1]
GPUS = {
    "T4": functools.partial(pretend, "cuda", (7, 5)),
    "A100": functools.partial(pretend, "cuda", (8, 0)),
    "Apple": functools.partial(pretend, "mps"),
}
PRECISIONS = {"T4": torch.float16, "A100": torch.bfloat16, "Apple": None}


def tiny(name, *, epochs=2):
    """The recipe with the narrowest network, for `tiny_images`: three steps an epoch."""
    settings = recipe(name).scaled(epochs=epochs, batch_size=14).replace(width=2, held_out=0)
    return settings.replace(sizes=(8, 16)) if settings.sizes else settings


def on_gpu():
    """What a run is given where a GPU is found."""
    device = devices.pick_device()
    assert device.type != "cpu"
    return {"device": device, "dtype": devices.amp_dtype(device)}


def train(settings, images, how, **more):
    function = run.train_lightning if settings.loop == "lightning" else run.train_plain
    return function(settings, images, **how, **more)


@pytest.mark.parametrize("name, gpu", [
    ("s10", "T4"), ("s10", "A100"), ("s10", "Apple"), ("s10_best", "T4"), ("s10_best", "Apple"),
    ("s10_cpu", "A100"), ("resnet9", "T4"), ("s10_albumentations", "A100"),
])
def test_a_run_goes_on_where_it_was_cut_off(name, gpu, tmp_path):
    settings = tiny(name)
    images = tiny_images(16 if settings.sizes else 8)
    with GPUS[gpu]():
        how = on_gpu()
        assert how["dtype"] is PRECISIONS[gpu]
        whole, _ = train(settings, images, how)
        with cut_off_after(4):  # an epoch has three steps
            train(settings, images, how, checkpoint=tmp_path / "checkpoint.pt")
        model, _ = train(
            settings, images, how, checkpoint=tmp_path / "checkpoint.pt", resume=True
        )
        assert_same_state(whole, model)
        states = model.state_dict().values()
        assert {tensor.device.type for tensor in states} == {how["device"].type}
        assert all(tensor.isfinite().all() for tensor in states)


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name, loop", [
    ("s10", "plain"), ("s10_best", "plain"), ("s10_best", "lightning"), ("resnet9", "lightning"),
])
def test_a_first_step_that_overflows_is_left_out(name, loop, tmp_path, monkeypatch):
    """In float16, and nobody is told that the schedule was ahead of the optimizer."""
    function, factors = training.loss_and_correct, iter([1e34])

    def too_large(*args):
        loss, correct = function(*args)
        return loss * next(factors, 1.0), correct

    monkeypatch.setattr(training, "loss_and_correct", too_large)
    with GPUS["T4"]():
        settings = tiny(name).replace(loop=loop)
        out = {"out": tmp_path} if loop == "lightning" else {}
        model, history = train(settings, tiny_images(), on_gpu(), **out)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert history[0]["train_loss"] > 1e30 > history[1]["train_loss"]


@pytest.mark.parametrize("name, gpu", [
    ("s12", "A100"), ("s12", "Apple"), ("s10_best", "T4"), ("resnet9", "T4"),
])
def test_both_loops_train_the_same(name, gpu, tmp_path):
    settings, images = tiny(name).replace(loop="plain"), tiny_images()
    with GPUS[gpu]():
        how = on_gpu()
        plain, _ = train(settings, images, how)
        other, history = train(
            settings.replace(loop="lightning"), images, how, out=tmp_path, seed=0
        )
        for first, second in zip(
            plain.state_dict().values(), other.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(first, second)
        again = train(
            settings.replace(loop="lightning"), images, how, out=tmp_path, resume=True
        )
        assert again[1] == history


@pytest.mark.parametrize("loop", ["plain", "lightning"])
def test_a_run_goes_on_on_another_kind_of_device(loop, tmp_path, monkeypatch, capsys):
    """By the command: from a T4 to an A100, and from there to a CPU."""
    monkeypatch.setattr(run, "save_figures", lambda *_: [])
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a CPU for float32
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    settings = tiny("s10_best", epochs=3).replace(loop=loop)
    starts = (GPUS["T4"], 4), (GPUS["A100"], 4), (nullcontext, None)
    for place, steps in starts:
        options = run.Options(data="tiny", out=tmp_path / "out", resume=True)
        cut_off = cut_off_after(steps) if steps else nullcontext()
        with place(), cut_off, run.output_folder(settings, options) as out:
            run.run(settings, tiny_images(), options, out)
    rows = read_history(tmp_path / "out")
    assert [row["precision"] for row in rows] == ["float16", "bfloat16", "float32"]
    metrics = files.read_metrics(tmp_path / "out")
    assert metrics["precision"] == "float16, bfloat16, float32"
    assert metrics["device"].startswith("no GPU at all, ")
    assert "\ngoes on in float32; it was bfloat16 so far\n" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", ["T4", "Apple"])
def test_range_test_and_questions(gpu, tmp_path):
    """What a trained network is asked, in notebooks, on the page and by `utils.evaluate`."""
    settings, images = tiny("s10"), tiny_images()
    with GPUS[gpu]():
        how = on_gpu()
        model = build(settings, images).to(how["device"])
        batches = training_batches(settings, images, device=how["device"])
        optimizer = make_optimizer(model, settings)
        found = lr_range_test(
            model, batches, optimizer, settings, start_lr=1e-4, steps=6, dtype=how["dtype"]
        )
        assert len(found) > 2
        about = run.weights_metadata(settings, images)
        files.save_tensors(model.state_dict(), tmp_path / "weights.safetensors", about)
        model = load_weights(tmp_path / "weights.safetensors").to(how["device"])
        maps = explain.grad_cam(model, images.test_images, images.test_labels)
        assert maps.device.type == "cpu"
        plotting.heat(images.test_images, maps).numpy()
        explain.embeddings(model, images.test_images).numpy()
        evaluate.likeliest(["one"], explain.probabilities(model, images.test_images[:1]),
                           images.classes)


@pytest.mark.parametrize("name", ["s10", "s10_best", "resnet9", "s12"])
def test_no_step_waits_for_the_device(name, tmp_path):
    """Twice the steps are waited for as often; in float16, which asks whether it overflowed."""
    counts = []
    for share in (2, 1):
        images = tiny_images()
        images = replace(images, train_images=images.train_images[: 42 // share],
                         train_labels=images.train_labels[: 42 // share])
        with GPUS["T4"]():
            settings = tiny(name).replace(batch_size=3)
            out = {"out": tmp_path / str(share)} if settings.loop == "lightning" else {}
            train(settings, images, on_gpu(), **out)
            counts.append(sum(waits.values()))
    assert counts[0] == counts[1]


@pytest.fixture
def few_shapes(monkeypatch):
    """For notebooks: the sample with few pictures, of a quarter of the pixels."""
    sample = data.builtin_sample()
    sample = replace(
        sample,
        train_images=sample.train_images[::7, :, ::2, ::2], train_labels=sample.train_labels[::7],
        test_images=sample.test_images[::7, :, ::2, ::2], test_labels=sample.test_labels[::7],
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COURSE_RESIZE", raising=False)
    monkeypatch.setenv("COURSE_DATA", "sample")
    monkeypatch.setattr(data, "builtin_sample", lambda: sample)
    monkeypatch.setattr(notebook, "SAMPLE_WIDTH", 2)


@pytest.mark.parametrize("name, gpu", [("S10_custom_resnet", "T4"), ("S12_lightning", "A100")])
def test_the_cells_of_a_notebook(name, gpu, few_shapes, monkeypatch):
    noise = benchmark.noise(192)
    pixels = noise.train_images[..., ::4, ::4].contiguous()
    monkeypatch.setattr(benchmark, "noise", lambda _: replace(noise, train_images=pixels))
    monkeypatch.setattr(  # a process of its own would have no GPU
        benchmark, "own_process", lambda _, function, *args, **how: function(*args, **how)
    )
    reader = Reader(ROOT / f"{name}.ipynb")
    with GPUS[gpu]():
        reader.run()
    assert reader.names["device"].type == "cuda"
    assert reader.names["results"].accuracy == pytest.approx(
        reader.names["history"][-1]["test_acc"]
    )


@pytest.mark.parametrize("name, settings, fit", [
    ("S10_custom_resnet", 'notebook.begin("s10")', "model, history = run.train_plain("),
    ("S12_lightning", 'notebook.begin("s12")', "model, history = run.train_lightning("),
], ids=["S10", "S12"])
def test_a_notebook_goes_on_on_another_gpu(name, settings, fit, few_shapes, monkeypatch, capsys):
    """Run anew from the top after a reconnect from a T4 to an A100, and from there to a T4."""
    monkeypatch.setattr(notebook, "SAMPLE_EPOCHS", 3)
    for gpu, steps in (("T4", 5), ("A100", 5), ("T4", None)):  # an epoch has four steps
        reader = Reader(ROOT / f"{name}.ipynb")
        with GPUS[gpu](), cut_off_after(steps) if steps else nullcontext():
            reader.run(last=settings)
            reader.run(fit)
    done = [row["precision"] for row in reader.names["history"]]
    assert done == ["float16", "bfloat16", "float16"]
    assert "\ngoes on in bfloat16; it was float16 so far\n" in capsys.readouterr().out


@pytest.mark.parametrize("mistake, words", [
    (lambda x: x + torch.ones(2), "same device"),
    (lambda x: x.numpy(), "can't convert"),
    (lambda x: torch.rand(2, device=x.device, generator=torch.Generator()), "for generator"),
    (lambda x: x.double(), "float64"),
    (lambda x: torch.ones(2)[x.long() - 1], "same device"),
], ids=["mixture", "numpy", "generator", "float64", "index"])
def test_what_a_gpu_would_refuse_is_refused(mistake, words):
    with pretend("mps"), pytest.raises((RuntimeError, TypeError), match=words):
        mistake(torch.ones(2, device="mps"))
