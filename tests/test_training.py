"""A step, an epoch, predictions and `fit` against sums by hand; runs that were cut off."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import (
    CPU,
    Small,
    assert_same_state,
    cut_off_after,
    tiny_images,
    without_times,
)
from utils import InputError, explain, files, models, run, training
from utils.batches import evaluation_batches, training_batches
from utils.models import CustomResNet
from utils.optimization import make_optimizer, one_cycle
from utils.recipes import ABOUT_THE_SOURCE, Recipe
from utils.transforms import Normalization

FP32 = {"scaler": torch.amp.GradScaler("cpu", enabled=False), "dtype": None}
TINY = Recipe(
    name="tiny", epochs=3, peak_epoch=1, batch_size=16, min_lr=1e-3, max_lr=1e-2, padding=1,
    cutout=2,
)


def linear_model():
    """Without BatchNorm, so that an image's logits do not depend on its batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


def uneven_batches():
    """11 images in batches of 4, 4 and 3; the last one is of another kind."""
    torch.manual_seed(1)
    images, labels = torch.randn(11, 3, 4, 4), torch.randint(0, 3, (11,))
    images[8:] *= 20
    return images, labels, list(zip(images.split(4), labels.split(4), strict=True))


def epoch(model, batches, recipe=TINY, *, lr=0.0):
    """An epoch in which step number i, from 1, has i times the rate `lr`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1)
    return training.train_epoch(model, batches, optimizer, scheduler, recipe, **FP32)


def train(path=None, *, recipe=TINY, images=None, **how):
    """A run on the tiny images. Returns the model and the history."""
    images = images or tiny_images()
    return run.train_plain(recipe, images, device=CPU, checkpoint=path, **how)


# A step, an epoch, predictions


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_an_epoch_counts_each_image_once(label_smoothing):
    images, labels, batches = uneven_batches()
    model = linear_model()
    logits = model(images).detach()
    recipe = TINY.replace(label_smoothing=label_smoothing)
    loss, accuracy, rate = epoch(model, batches, recipe, lr=1e-12)
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == 100 * (logits.argmax(1) == labels).sum().item() / 11
    assert rate == pytest.approx(3e-12)


def test_training_is_in_training_mode():
    model = Small(3).eval()
    epoch(model, uneven_batches()[2])
    assert model.prep[1].num_batches_tracked == 3


def test_predictions_are_in_order_and_leave_the_model_alone():
    """But for its mode: evaluation is what it is asked in from then on."""
    images, labels, batches = uneven_batches()
    model, same = Small(3), Small(3)
    same.load_state_dict(model.state_dict())
    results = training.predict(model, batches, classes=["a", "b", "c"])
    assert not model.training
    assert_same_state(model, same)
    assert results.classes == ("a", "b", "c") and torch.equal(results.labels, labels)
    torch.testing.assert_close(results.logits, same.eval()(images))


def test_a_step_is_a_step_of_the_optimizer_on_this_batch_alone():
    images, labels, _ = uneven_batches()
    model, expected = linear_model(), linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in (slice(None), slice(5)):
        training.training_step(model, images[batch], labels[batch], optimizer, TINY, **FP32)
        loss = F.cross_entropy(expected(images[batch]), labels[batch])
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    for first, second in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_gradients_are_clipped_by_value():
    images, labels, _ = uneven_batches()
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    raw = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    recipe = TINY.replace(gradient_clip=0.05)
    training.training_step(model, images, labels, optimizer, recipe, **FP32)
    for parameter, gradient in zip(model.parameters(), raw, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.clamp(-0.05, 0.05))
    assert max(gradient.abs().max() for gradient in raw) > 0.05


# The scaler of float16


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_that_overflows_is_skipped_and_lowers_the_scale(optimizer, clip):
    images, labels, _ = uneven_batches()
    model, before = linear_model(), linear_model()
    recipe = TINY.replace(optimizer=optimizer, gradient_clip=clip)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    how = {"scaler": scaler, "dtype": torch.float16}
    training.training_step(model, images, labels, optimizer, recipe, **how)
    assert_same_state(model, before)
    assert scaler.get_scale() == 2.0**39
    for _ in range(39):  # until the scale fits
        training.training_step(model, images, labels, optimizer, recipe, **how)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model[1].weight, before[1].weight)


def test_the_scale_is_taken_out_before_gradients_are_clipped():
    """bfloat16 reaches as far as float32, so that a power of two changes no digit."""
    images, labels, _ = uneven_batches()
    plain, scaled = linear_model(), linear_model()
    recipe = TINY.replace(gradient_clip=0.05)
    for model, enabled in ((plain, False), (scaled, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        training.training_step(
            model, images, labels, optimizer, recipe, scaler=scaler, dtype=torch.bfloat16
        )
    assert_same_state(scaled, plain)


def test_a_resumed_run_in_float16_goes_on_with_its_scale(tmp_path, small_network, monkeypatch):
    """The scale falls in the first steps and rises later."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**22, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole, history = train(tmp_path / "whole.pt", dtype=torch.float16)
    with cut_off_after(7):
        train(tmp_path / "cut.pt", dtype=torch.float16)
    scale = files.read_checkpoint(tmp_path / "cut.pt")["scaler"]["scale"]
    assert scale != 2.0**22
    resumed, again = train(tmp_path / "cut.pt", dtype=torch.float16, resume=True)
    assert_same_state(resumed, whole)
    assert without_times(again) == without_times(history)
    first, second = (files.read_checkpoint(tmp_path / name) for name in ("whole.pt", "cut.pt"))
    assert first["scaler"] == second["scaler"]


# Whole runs


@pytest.mark.parametrize("network", [CustomResNet, Small])
def test_a_run_that_was_cut_off_in_mid_epoch_ends_as_one_that_was_not(
    tmp_path, monkeypatch, network
):
    """Weights, statistics and history bit for bit, in the real network, but narrow, too."""
    monkeypatch.setitem(models.MODELS, "custom_resnet", network)
    recipe = TINY.replace(epochs=2, label_smoothing=0.1, gradient_clip=0.1, width=8)
    whole, history = train(recipe=recipe)
    with cut_off_after(4):  # an epoch has three steps
        train(tmp_path / "checkpoint.pt", recipe=recipe)
    resumed, again = train(tmp_path / "checkpoint.pt", recipe=recipe, resume=True)
    assert_same_state(resumed, whole)
    assert without_times(again) == without_times(history)
    assert [row["epoch"] for row in again] == [1, 2]


def test_averaged_weights_are_the_running_average_of_all_steps(small_network, monkeypatch):
    """The statistics too, and evaluation is theirs."""
    steps, step = [], training.training_step

    def training_step(model, *args, **how):
        answer = step(model, *args, **how)
        steps.append({k: v.clone() for k, v in model.state_dict().items()})
        return answer

    monkeypatch.setattr(training, "training_step", training_step)
    model, history = train(recipe=TINY.replace(averaging=0.75))
    average = steps[0]
    for state in steps[1:]:
        average = {k: 0.75 * average[k] + 0.25 * state[k] for k in state if "num" not in k}
    assert len(steps) == 9
    for name, values in average.items():
        torch.testing.assert_close(model.state_dict()[name], values)
    results = training.predict(model, evaluation_batches(tiny_images(), device=CPU))
    assert history[2]["test_loss"] == results.loss


@pytest.mark.parametrize("steps", [4, 9])  # of nine: in the second epoch, and after the last
def test_a_resumed_run_ends_with_the_averaged_weights(steps, tmp_path, small_network):
    recipe = TINY.replace(averaging=0.75, alternating_flip=True)
    whole, history = train(tmp_path / "whole.pt", recipe=recipe)
    if steps < 9:
        with cut_off_after(steps):
            train(tmp_path / "cut.pt", recipe=recipe)
    path = tmp_path / ("cut.pt" if steps < 9 else "whole.pt")
    resumed, again = train(path, recipe=recipe, resume=True)
    assert_same_state(resumed, whole)
    assert without_times(again) == without_times(history)


@pytest.mark.parametrize("averaging", [0.0, 0.75])
def test_whoever_asks_a_trained_network_finds_it_in_evaluation_mode(averaging, small_network):
    """Or else it would normalise the pictures by themselves, and its statistics would move."""
    images, (model, history) = tiny_images(), train(recipe=TINY.replace(averaging=averaging))
    assert not model.training
    model.classes, (model.mean, model.std) = images.classes, images.statistics
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        model.train()  # as an interrupt leaves it
        results = explain.predictions(model, images)
        assert results.accuracy == history[-1]["test_acc"]
    model.train()
    explain.grad_cam(model, images.test_images, images.test_labels, layer="prep")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("averaging", [0.0, 0.75])
def test_a_run_goes_on_in_another_precision_and_says_so(averaging, tmp_path, small_network, capsys):
    """As where a notebook comes back on another GPU; a finished one does nothing."""
    recipe = TINY.replace(averaging=averaging)
    rows = []
    for steps, dtype in (4, torch.float16), (4, torch.bfloat16), (None, torch.float16):
        how = {"recipe": recipe, "dtype": dtype, "resume": True}
        if steps:
            with cut_off_after(steps):  # an epoch has three steps
                train(tmp_path / "checkpoint.pt", **how)
        else:
            _, rows = train(tmp_path / "checkpoint.pt", **how)
        lines = capsys.readouterr().out.splitlines()
    assert [row["precision"] for row in rows] == ["float16", "bfloat16", "float16"]
    assert lines[3] == "goes on in float16; it was bfloat16 so far"
    assert train(tmp_path / "checkpoint.pt", recipe=recipe, resume=True)[1] == rows
    assert capsys.readouterr().out == f"{training.table(rows)}\n"


def test_each_epoch_has_an_order_of_its_own(small_network, monkeypatch):
    seen, step = [], training.training_step

    def training_step(model, images, labels, *args, **how):
        seen.extend(labels.tolist())
        return step(model, images, labels, *args, **how)

    monkeypatch.setattr(training, "training_step", training_step)
    train()
    epochs = [seen[:42], seen[42:84], seen[84:]]
    assert all(sorted(labels) == sorted(tiny_images().train_labels) for labels in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_resuming_a_finished_run_changes_nothing(tmp_path, small_network):
    path = tmp_path / "checkpoint.pt"
    model, history = train(path)
    before = path.read_bytes()
    again, same = train(path, resume=True)
    assert_same_state(again, model)
    assert same == history and path.read_bytes() == before


def test_without_resume_a_checkpoint_is_not_read(tmp_path, small_network):
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    model, _ = train(tmp_path / "checkpoint.pt")
    assert_same_state(model, train()[0])


def test_history_of_a_run(capsys, small_network):
    model, history = train()
    images = tiny_images()
    results = training.predict(model, evaluation_batches(images, device=CPU))
    assert (history[2]["test_loss"], history[2]["test_acc"]) == (results.loss, results.accuracy)
    assert history[0]["lr"] == pytest.approx(1e-2)  # the peak is the end of epoch 1
    assert history[2]["lr"] == pytest.approx(1e-3)
    assert history[0]["images_per_s"] == pytest.approx(42 / history[0]["seconds"])
    assert capsys.readouterr().out == f"{training.table(history)}\n"


def test_lines_of_the_table_are_as_long_as_its_header():
    rows = [
        training.history_row(
            number, lr=0.01 / number, train=(2 / 3, 100 / 3), test=(1e-7, 100.0), images=50_000,
            seconds=4.05, device=CPU, dtype=None,
        )
        for number in range(1, 25)
    ]
    header, *lines = training.table(rows).splitlines()
    assert {len(line) for line in lines} == {len(header)}
    assert [line.split()[0] for line in lines] == [str(number) for number in range(1, 25)]


def test_settings_of_the_recipe_arrive():
    """One step at a rate near zero: the loss is that of the untrained model, smoothed."""
    recipe = TINY.scaled(epochs=1, batch_size=42).replace(
        min_lr=1e-12, max_lr=1e-11, padding=0, flip=1.0, cutout=0,
        label_smoothing=0.3, gradient_clip=1e-3, weight_decay=0.25,
    )
    images, model = tiny_images(), Small(3)
    with torch.no_grad():
        logits = model(Normalization(*images.statistics)(images.train_images.flip(3)))
    optimizer = make_optimizer(model, recipe)
    history = training.fit(
        model, training_batches(recipe, images, device=CPU),
        evaluation_batches(images, device=CPU), optimizer,
        one_cycle(optimizer, recipe, total_steps=1), recipe,
    )
    expected = F.cross_entropy(logits, images.train_labels, label_smoothing=0.3).item()
    assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradients.abs().max() == pytest.approx(1e-3, rel=1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


# Checkpoints of other runs


def refused(path, word, **how):
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"^the checkpoint [^\n]*its {word} differs[^\n]*$"):
        train(path, resume=True, **how)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how, word", [
    ({"recipe": TINY.replace(max_lr=0.02)}, "recipe"),
    ({"recipe": TINY.replace(epochs=4)}, "recipe"),
    ({"seed": 1}, "seed"),
], ids=str)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, small_network, how, word):
    train(tmp_path / "checkpoint.pt")
    refused(tmp_path / "checkpoint.pt", word, **how)


def test_a_checkpoint_of_other_images_is_refused(tmp_path, small_network):
    train(tmp_path / "checkpoint.pt")
    images = tiny_images()
    images.test_images[0, 0, 0, 0] ^= 1
    refused(tmp_path / "checkpoint.pt", "data", images=images)


def test_a_checkpoint_begun_under_other_defaults_is_refused(tmp_path, small_network):
    """All settings are in it, those at their defaults as well."""
    path = tmp_path / "checkpoint.pt"
    train(path)
    saved = torch.load(path, weights_only=True)
    settings = saved["identity"]["recipe"]
    assert settings.keys() == Recipe.model_fields.keys() - ABOUT_THE_SOURCE
    for changed in ({"rotation": 5.0}, {"logit_scale": 0.5}, {"final_lr": 1e-5}):
        saved["identity"]["recipe"] = settings | changed
        torch.save(saved, path)
        refused(path, "recipe")


def test_what_the_source_claims_does_not_make_another_run(tmp_path, small_network):
    _, history = train(tmp_path / "checkpoint.pt")
    recipe = TINY.replace(claimed={"test": 99.0}, original={"epochs": 2})
    assert train(tmp_path / "checkpoint.pt", recipe=recipe, resume=True)[1] == history


# A loss that is not finite


def test_a_loss_that_is_not_finite_keeps_the_last_whole_epoch(tmp_path, small_network, monkeypatch):
    path, steps, step = tmp_path / "checkpoint.pt", [], training.training_step

    def training_step(model, images, *args, **how):
        steps.append(1)
        return step(model, images / (len(steps) <= 6), *args, **how)  # then by zero

    with monkeypatch.context() as patch, pytest.raises(InputError, match="^the loss is not finite"):
        patch.setattr(training, "training_step", training_step)
        train(path)
    assert len(files.read_checkpoint(path)["history"]) == 2
    resumed, history = train(path, resume=True)
    whole, expected = train()
    assert_same_state(resumed, whole)
    assert without_times(history) == without_times(expected)


def test_a_single_bad_batch_between_good_ones_is_noticed():
    """At a step at which the sum is not looked at."""
    _, _, batches = uneven_batches()
    batches[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        epoch(linear_model(), batches)


def test_a_test_loss_that_is_not_finite_is_noticed():
    with pytest.raises(InputError, match="not finite"):
        training.history_row(
            1, lr=0.1, train=(1.0, 50.0), test=(float("nan"), 50.0), images=1, seconds=1.0,
            device=CPU, dtype=None,
        )
