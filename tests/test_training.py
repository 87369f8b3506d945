"""Training and evaluation against sums by hand, checkpoints, and runs that were cut off."""

import csv
import dataclasses
import pathlib
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils import InputError, training
from utils.data import ImageData, make_loader
from utils.models import CustomResNet
from utils.recipes import Recipe
from utils.schedule import one_cycle
from utils.transforms import BatchTransform

FP32 = {"scaler": torch.amp.GradScaler("cpu", enabled=False), "dtype": None}
CPU = torch.device("cpu")


def tiny_model(seed=0):
    """Three classes of small images; with BatchNorm, so with buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveMaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 3),
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


def rising_rates(optimizer):
    """1, 2, 3, … times the optimizer's own rate."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1)


# Meters


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_train_epoch_counts_each_image_once(label_smoothing):
    images, labels, batches = uneven_batches()
    model = linear_model()
    with torch.no_grad():
        logits = model(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    loss, accuracy, rate = training.train_epoch(
        model, batches, optimizer, rising_rates(optimizer), label_smoothing=label_smoothing, **FP32
    )
    expected = F.cross_entropy(logits, labels, label_smoothing=label_smoothing).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == 100 * (logits.argmax(1) == labels).sum().item() / 11
    assert rate == pytest.approx(3e-12)


def test_evaluate_counts_each_image_once():
    images, labels, batches = uneven_batches()
    model = linear_model()
    with torch.no_grad():
        logits = model(images)
    loss, accuracy = training.evaluate(model, batches)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert accuracy == 100 * (logits.argmax(1) == labels).sum().item() / 11


@pytest.mark.parametrize("was_training", [True, False])
def test_predict_keeps_order_and_mode(was_training):
    images, labels, batches = uneven_batches()
    model = tiny_model().train(was_training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, targets = training.predict(model, batches)
    assert model.training == was_training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(targets, labels)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.eval()(images))


def test_training_is_in_training_mode():
    images, labels, batches = uneven_batches()
    model = tiny_model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.train_epoch(model, batches, optimizer, rising_rates(optimizer), **FP32)
    assert model[1].num_batches_tracked == len(batches)


def test_step_is_a_step_of_the_optimizer_on_this_batch_alone():
    images, labels, _ = uneven_batches()
    model, expected = linear_model(), linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.training_step(model, images, labels, optimizer, **FP32)
    training.training_step(model, images[:5], labels[:5], optimizer, **FP32)
    for batch in (slice(None), slice(5)):
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
    loss = F.cross_entropy(model(images), labels)
    raw = torch.autograd.grad(loss, list(model.parameters()))
    training.training_step(model, images, labels, optimizer, gradient_clip=0.05, **FP32)
    for parameter, gradient in zip(model.parameters(), raw, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.clamp(-0.05, 0.05))
    assert max(gradient.abs().max() for gradient in raw) > 0.05


def test_confusion_matrix_has_true_classes_in_rows():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 1, 1, 1, 2, 2])
    matrix = training.confusion_matrix(predictions, labels, 4)
    assert matrix.tolist() == [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


# Devices


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "cpu:x"])
def test_device_that_is_not_there(name):
    with pytest.raises(InputError) as caught:
        training.pick_device(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_device_by_name():
    assert training.pick_device("cpu") == CPU


def test_best_device_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    assert training.pick_device() == CPU


@pytest.mark.parametrize(
    "abilities, dtype",
    [
        ({}, None),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
    ],
)
def test_mixed_precision_on_a_cpu_that_multiplies_bfloat16(monkeypatch, abilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert training.amp_dtype(CPU) is dtype


# Files


def rows(count):
    return training.History(
        {
            "epoch": epoch, "lr": 0.01 / epoch, "train_loss": 2 / 3 / epoch, "train_acc": 100 / 3,
            "test_loss": 1e-7 / 3, "test_acc": 100.0, "images_per_s": 12345.678, "seconds": 0.1,
        }
        for epoch in range(1, count + 1)
    )


def test_history_is_saved_with_all_digits(tmp_path):
    history = rows(3)
    history.save(tmp_path / "new folder" / "history.csv")
    with open(tmp_path / "new folder" / "history.csv", newline="") as file:
        saved = list(csv.DictReader(file))
    assert [{name: float(row[name]) for name in row} for row in saved] == list(history)
    assert history.column("epoch") == [1, 2, 3]


def test_lines_of_the_table_are_as_long_as_its_header():
    header, *lines = str(rows(24)).splitlines()
    assert len(lines) == 24
    assert {len(line) for line in lines} == {len(header)}
    assert lines[23] == rows(24).line(23) and lines[23].split()[0] == "24"


def test_whole_file_takes_the_old_files_place_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with training.whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_whole_file_keeps_the_old_file_when_the_block_raises(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), training.whole_file(path) as part:
        part.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Whole runs


TINY = Recipe(
    name="tiny", epochs=3, peak_epoch=1, batch_size=16, min_lr=1e-3, max_lr=1e-2, cutout=2
)


def tiny_images():
    torch.manual_seed(2)
    labels = torch.arange(60) % 3
    images = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8)
    images[torch.arange(60), labels] //= 4
    return ImageData("tiny", ("a", "b", "c"), images[:42], labels[:42], images[42:], labels[42:])


def set_up(model, images, recipe):
    """The arguments of `fit`, all but its settings."""
    loaders = training.make_loaders(recipe, images, device=CPU)
    optimizer = training.make_optimizer(model, recipe)
    scheduler = one_cycle(
        optimizer, total_steps=recipe.epochs * len(loaders[0]), **recipe.rates()
    )
    return model, *loaders, optimizer, scheduler


def run(path=None, *, recipe=TINY, seed=0, **settings):
    """A run of the tiny model. Returns the model and the history."""
    model = tiny_model(seed)
    parts = set_up(model, tiny_images(), recipe)
    return model, training.fit(*parts, recipe=recipe, checkpoint=path, **settings)


def without_times(history):
    times = ("images_per_s", "seconds")
    return [{name: row[name] for name in row if name not in times} for row in history]


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class CutOffError(Exception):
    pass


def cut_off_after(optimizer, steps):
    """The optimizer raises instead of making step number `steps` + 1."""
    taken = iter(range(steps))

    def raise_at_the_end(*_):
        if next(taken, None) is None:
            raise CutOffError

    optimizer.register_step_pre_hook(raise_at_the_end)


def test_run_that_was_cut_off_in_mid_epoch_ends_as_one_that_was_not(tmp_path):
    """With the real network: weights, statistics and history bit for bit."""
    images = ImageData(
        "noise", ("a", "b", "c"),
        torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 3,
        torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10) % 3,
    )
    recipe = dataclasses.replace(TINY, label_smoothing=0.1, gradient_clip=0.1)

    def parts(seed):
        torch.manual_seed(seed)
        model = CustomResNet(3).to(memory_format=torch.channels_last)
        return set_up(model, images, recipe)

    whole = parts(0)
    expected = training.fit(*whole, recipe=recipe, checkpoint=tmp_path / "whole.pt")
    interrupted = parts(0)
    cut_off_after(interrupted[3], 4)  # an epoch has three steps
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CutOffError):
        training.fit(*interrupted, recipe=recipe, checkpoint=path)
    resumed = parts(77)
    history = training.fit(*resumed, recipe=recipe, checkpoint=path, resume=True)
    assert_same_state(whole[0], resumed[0])
    assert without_times(history) == without_times(expected)
    assert [row["epoch"] for row in history] == [1, 2, 3]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    model, history = run(tmp_path / "checkpoint.pt")
    again, same = run(tmp_path / "checkpoint.pt", seed=5, resume=True)
    assert_same_state(model, again)
    assert same == history


def test_without_resume_a_checkpoint_is_not_read(tmp_path):
    first = run(tmp_path / "checkpoint.pt")[1]
    (tmp_path / "checkpoint.pt").write_bytes(b"garbage")
    second = run(tmp_path / "checkpoint.pt")[1]
    assert without_times(first) == without_times(second)


def test_history_of_a_run(capsys):
    model, history = run()
    images = tiny_images()
    loader = training.make_loaders(TINY, images, device=CPU)[1]
    assert (history[-1]["test_loss"], history[-1]["test_acc"]) == training.evaluate(model, loader)
    assert history.column("lr")[0] == pytest.approx(1e-2)  # the peak is the end of epoch 1
    assert history.column("lr")[2] == pytest.approx(1e-3)
    assert history[0]["images_per_s"] == pytest.approx(42 / history[0]["seconds"])
    assert capsys.readouterr().out == f"{history}\n"


def test_settings_of_the_recipe_arrive():
    """One step at a rate near zero: the loss is that of the untrained model, smoothed."""
    recipe = dataclasses.replace(
        TINY.scaled(epochs=1, batch_size=42),
        min_lr=1e-12, max_lr=1e-11, padding=0, flip=1.0, cutout=0,
        label_smoothing=0.3, gradient_clip=1e-3, weight_decay=0.25,
    )
    images = tiny_images()
    model = tiny_model()
    parts = set_up(model, images, recipe)
    transform = parts[1].dataset.transform
    with torch.no_grad():
        logits = tiny_model()(transform.normalize(images.train_images.flip(3)))
    history = training.fit(*parts, recipe=recipe)
    expected = F.cross_entropy(logits, images.train_labels, label_smoothing=0.3).item()
    assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert gradients.abs().max() == pytest.approx(1e-3, rel=1e-6)
    assert parts[3].param_groups[0]["weight_decay"] == 0.25


def test_test_images_are_not_augmented():
    loader = training.make_loaders(TINY, tiny_images(), device=CPU)[1]
    assert loader.dataset.transform.augment is False
    first, second = next(iter(loader)), next(iter(loader))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], tiny_images().test_labels)


def test_normalisation_is_by_the_training_images():
    """Not by the test images, which are to stay unseen."""
    images = tiny_images()
    changed = dataclasses.replace(images, test_images=255 - images.test_images)
    first = training.make_loaders(TINY, images, device=CPU)[0].dataset.transform
    second = training.make_loaders(TINY, changed, device=CPU)[1].dataset.transform
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)


# Checkpoints that can't be used


def refuse(path, **settings):
    """Resuming gives an InputError in one line that names the checkpoint."""
    content = path.read_bytes()
    with pytest.raises(InputError) as caught:
        run(path, resume=True, **settings)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == content
    return str(caught.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_truncated_checkpoint(tmp_path, share):
    path = tmp_path / "checkpoint.pt"
    run(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged" in refuse(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04garbage"])
def test_garbage_checkpoint(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert "damaged" in refuse(tmp_path / "checkpoint.pt")


def test_checkpoint_with_a_wrong_byte(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(path)
    path.write_bytes(path.read_bytes().replace(b"history", b"h\xffstory"))
    assert "damaged" in refuse(path)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"identity": "x"}, tiny_model().state_dict()],
    ids=["list", "tensor", "identity", "weights"],
)
def test_file_that_is_another_programs_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    assert "none of ours" in refuse(tmp_path / "checkpoint.pt")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_checkpoint_does_not_run_code(tmp_path, save):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    save({"identity": Evil(trace)}, path)
    refuse(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists(), "the file is harmless"


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"recipe": dataclasses.replace(TINY, max_lr=0.02)}, "recipe"),
        ({"recipe": dataclasses.replace(TINY, epochs=4)}, "recipe"),
        ({"identity": {"seed": 1, "data": "abc"}}, "seed"),
        ({"identity": {"seed": 0, "data": "abd"}}, "data"),
    ],
)
def test_checkpoint_of_another_run(tmp_path, changes, word):
    path = tmp_path / "checkpoint.pt"
    run(path, identity={"seed": 0, "data": "abc"})
    message = refuse(path, **{"identity": {"seed": 0, "data": "abc"}, **changes})
    assert f"its {word} differs" in message


# A loss that is not finite


def test_loss_that_is_not_finite(tmp_path):
    path = tmp_path / "checkpoint.pt"
    model = tiny_model()
    parts = set_up(model, tiny_images(), TINY)
    original = parts[1].set_epoch
    good = {}

    def set_epoch(number):
        original(number)
        if number == 2:
            good.update({name: value.clone() for name, value in model.state_dict().items()})
            model[-1].weight.data.fill_(float("inf"))

    parts[1].set_epoch = set_epoch
    with pytest.raises(InputError, match="not finite") as caught:
        training.fit(*parts, recipe=TINY, checkpoint=path)
    assert "\n" not in str(caught.value)
    saved = torch.load(path, weights_only=True)
    assert len(saved["history"]) == 2
    assert all(torch.equal(saved["model"][name], value) for name, value in good.items())
    history = run(path, resume=True)[1]
    assert without_times(history) == without_times(run()[1])


def test_loss_that_becomes_finite_again_is_noticed():
    """A single bad batch between good ones, at a step at which the sum is not looked at."""
    images, labels, batches = uneven_batches()
    batches[1][0][0, 0, 0, 0] = float("nan")
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(InputError, match="not finite"):
        training.train_epoch(model, batches, optimizer, rising_rates(optimizer), **FP32)


def test_test_loss_that_is_not_finite():
    parts = list(set_up(tiny_model(), tiny_images(), TINY))
    images = torch.full((6, 3, 8, 8), float("inf"))
    parts[2] = [(images, torch.zeros(6, dtype=torch.long))]
    with pytest.raises(InputError, match="not finite"):
        training.fit(*parts, recipe=TINY)


# Albumentations


def test_recipe_image_by_image():
    recipe = dataclasses.replace(TINY, per_image=True, padding=1)
    images = tiny_images()
    train_loader, test_loader = training.make_loaders(recipe, images, device=CPU, workers=0)
    batch, labels = next(iter(train_loader))
    assert batch.shape == (16, 3, 8, 8) and batch.dtype == torch.float32
    assert ((batch == 0).all(1).sum((1, 2)) >= 4).all()
    assert not isinstance(train_loader.dataset.transform, BatchTransform)
    assert isinstance(test_loader.dataset.transform, BatchTransform)


@pytest.mark.parametrize("per_image", [False, True])
def test_padding_mode_of_the_recipe_arrives(per_image):
    """Mirrored, a picture of one grey stays so wherever it is cropped."""
    recipe = dataclasses.replace(TINY, per_image=per_image, padding_mode="reflect", cutout=0)
    images = tiny_images()
    images.train_images[:] = torch.arange(42).view(-1, 1, 1, 1)
    train_loader = training.make_loaders(recipe, images, device=CPU, workers=0)[0]
    assert all((batch == batch[..., :1, :1]).all() for batch, _ in train_loader)


def test_draws_of_the_loader_depend_on_the_seed():
    first, second, other = (
        torch.cat([batch for batch, _ in training.make_loaders(
            TINY, tiny_images(), seed=seed, device=CPU
        )[0]])
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_loader_of_the_command_line_and_by_hand_agree():
    """`make_loaders` adds nothing of its own to `make_loader`."""
    images = tiny_images()
    train_loader = training.make_loaders(TINY, images, seed=3, device=CPU)[0]
    by_hand = make_loader(
        images.train_images, images.train_labels,
        BatchTransform(train_loader.dataset.transform.mean, train_loader.dataset.transform.std,
                       cutout=2),
        batch_size=16, shuffle=True, seed=3,
    )
    for first, second in zip(train_loader, by_hand, strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


# Optimizer and compilation


def test_logit_scale_trains_as_if_the_logits_were_multiplied():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.fc, self.scale = nn.Linear(4, 5), nn.Linear(5, 3), scale

        def forward(self, x):
            return self.scale * self.fc(self.body(x).relu())

    recipe = dataclasses.replace(TINY, optimizer="sgd", min_lr=0.1, weight_decay=0.0)
    images, labels = torch.randn(8, 4), torch.randint(0, 3, (8,))
    outer, inner = Scaled(0.125), Scaled(1.0)
    with torch.no_grad():
        inner.fc.weight *= 0.125
        inner.fc.bias *= 0.125
    for model, settings in (
        (outer, recipe), (inner, dataclasses.replace(recipe, logit_scale=0.125)),
    ):
        optimizer = training.make_optimizer(model, settings)
        for _ in range(3):
            training.training_step(model, images, labels, optimizer, **FP32)
    torch.testing.assert_close(outer(images), inner(images))
    torch.testing.assert_close(outer.body.weight, inner.body.weight)


def test_rates_of_their_own_follow_the_schedule():
    recipe = dataclasses.replace(
        TINY, optimizer="sgd", min_lr=0.01, max_lr=0.1, logit_scale=0.5
    )
    model = CustomResNet(3)
    optimizer = training.make_optimizer(model, recipe)
    scheduler = one_cycle(optimizer, total_steps=6, epochs=3, peak_epoch=1, min_lr=0.01, max_lr=0.1)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx([0.01, 0.0025])
    assert max(rates) == pytest.approx([0.1, 0.025])
    assert rates[-1] == pytest.approx([0.01, 0.0025])
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {
        id(p) for p in model.fc.parameters()
    }


def test_compiled_trains_the_same_and_tells_its_warm_up(monkeypatch):
    """With a backend that needs no compiler of the machine, and leaves the arithmetic alone."""
    compile_ = nn.Module.compile
    shapes = []

    def compile_eagerly(self, **_):
        compile_(self, backend="eager")
        self.register_forward_pre_hook(lambda _, images: shapes.append(tuple(images[0].shape)))

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    model, history = run(compiled=True)
    plain, plain_history = run()
    assert_same_state(model, plain)
    assert without_times(history) == without_times(plain_history)
    assert history.warm_up_seconds > 0 and plain_history.warm_up_seconds == 0
    sizes = {TINY.batch_size, 42 % TINY.batch_size} - {0}
    assert set(shapes[: len(sizes)]) == {(size, 3, 8, 8) for size in sizes}


def test_a_compiler_that_fails(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: setattr(self, "forward", fail))
    with pytest.raises(InputError, match=r"no C\+\+ compiler\); leave out --compile"):
        run(compiled=True)
