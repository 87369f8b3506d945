"""What trained weights are worth: accuracy, test-time flip, calibration, and the report."""

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import ON_CPU, Small, read_history, write_folder
from utils import data, evaluate, explain, models, run, train
from utils.data import ImageData
from utils.models import load_weights
from utils.results import Results


@pytest.fixture(autouse=True)
def always_small(small_network):
    """No test here needs the large one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures") / "colours", train=8, test=5, side=8)


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """The folder of a run of one epoch."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "custom_resnet", Small)
        patch.setattr(run, "save_figures", lambda *_: [])
        train.main([
            "s10", "--data", str(folder), "--epochs", "2", "--batch-size", "8", "--cutout", "2",
            "--padding", "1", "--out", str(out), *ON_CPU,
        ])
    return out


class ByColour(nn.Module):
    """Logits: the mean of each channel over the left half of the image, ten times."""

    classes, mean, std = ("a", "b", "c"), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        return self.factor * x[..., : x.shape[3] // 2].mean(dim=(2, 3))


def two_halves(left, right):
    """An image uint8 (3, 2, 4): `left` and `right` are the channels' values of its halves."""
    halves = [torch.tensor(half, dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
              for half in (left, right)]
    return torch.cat(halves, dim=2)


def test_the_command_reports_the_accuracy_of_the_run(out, folder, capsys):
    evaluate.main(["--weights", str(out / "weights.safetensors"), "--data", str(folder), *ON_CPU])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"weights  {out / 'weights.safetensors'}: s10, seed 0",
        "data     the folder colours: 15 test images of 8×8 pixels",
    ]
    accuracy = read_history(out)[-1]["test_acc"]
    assert f"test accuracy       {accuracy:6.2f} %  of 15 images" in lines
    assert [line.split()[0] for line in lines[-3:]] == ["blue", "green", "red"]


def test_training_pictures_are_not_read(out, tmp_path):
    """But for the first, which tells the size."""
    write_folder(tmp_path / "colours", train=2, test=1, side=8)
    for path in (tmp_path / "colours" / "train").rglob("001.png"):
        path.write_bytes(b"broken")
    evaluate.main([
        "--weights", str(out / "weights.safetensors"), "--data", str(tmp_path / "colours"), *ON_CPU
    ])


def test_flip_averages_the_logits_of_both_views(out, folder, monkeypatch):
    """Over several batches."""
    monkeypatch.setattr(explain, "BATCH_SIZE", 4)
    images, model = data.load(str(folder)), load_weights(out / "weights.safetensors")
    x = images.test_images.float() / 255
    x = (x - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    with torch.inference_mode():
        expected = model(x), (model(x) + model(x.flip(3))) / 2
    results = explain.plain_and_flipped(model, images)
    for found, logits in zip(results, expected, strict=True):
        torch.testing.assert_close(found.logits, logits)
        assert torch.equal(found.labels, images.test_labels)
        assert found.classes == ("blue", "green", "red")


def test_figures_by_hand():
    """The mirror image decides the second, and outvotes the first's right answer."""
    test_images = torch.stack([
        two_halves((100, 50, 0), (0, 250, 0)),  # a; mirrored b; both b
        two_halves((100, 50, 0), (0, 250, 0)),
        two_halves((0, 0, 200), (0, 0, 200)),  # c
        two_halves((0, 250, 0), (0, 0, 0)),  # b
    ])
    none = torch.zeros(0, 3, 2, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    images = ImageData("hand", ("a", "b", "c"), *none, test_images, torch.tensor([0, 1, 2, 0]))
    plain, flipped = explain.plain_and_flipped(ByColour(), images)
    assert (plain.accuracy, plain.per_class) == (50, {"a": 50, "b": 0, "c": 100})
    assert (flipped.accuracy, flipped.per_class) == (50, {"a": 0, "b": 100, "c": 100})


def test_the_report_is_aligned():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    right = 20 * torch.eye(2)[labels]
    flipped = Results(right, labels, ("cat", "automobile"))
    plain = Results(right.roll(1, 0), labels, ("cat", "automobile"))
    assert evaluate.report(plain, flipped).splitlines() == [
        "test accuracy        66.67 %  of 6 images",
        "with test-time flip 100.00 %",
        "calibration error    33.33 %  (ECE, 15 bins)",
        "",
        "cat         75.00 %",
        "automobile  50.00 %",
    ]


def test_pictures_are_classified(out, tmp_path, capsys):
    """Of any size; the likeliest class comes first."""
    for name, size in ("one.png", (64, 48)), ("two.jpg", (8, 20)):
        Image.new("RGB", size, (200, 10, 10)).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("one.png", "two.jpg")]
    evaluate.main([*paths, "--weights", str(out / "weights.safetensors"), *ON_CPU])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"weights  {out / 'weights.safetensors'}: s10, seed 0"
    assert lines[3] == paths[0] and lines[8] == paths[1]
    classes, shares = zip(*(line.split() for line in lines[4:7]), strict=True)
    assert {*classes} == {"blue", "green", "red"}
    shares = [float(share.rstrip("%")) for share in shares]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.02


@pytest.mark.parametrize("resize", [[], ["--resize", "12"]], ids=["one size", "resized"])
def test_the_answers_for_test_pictures_are_those_of_the_test(
    resize, tmp_path, capsys, no_figures
):
    """Of a size that is not 32×32, or of several."""
    folder = write_folder(tmp_path / "colours", train=4, test=3, side=20)
    paths = sorted((folder / "test").rglob("*.png"))
    if resize:
        for i, path in enumerate(folder.rglob("*.png")):
            with Image.open(path) as picture:
                picture.resize((14 + i, 40 - i)).save(path)
    train.main([
        "s10", "--data", str(folder), "--epochs", "1", "--batch-size", "12", "--cutout", "2",
        "--out", str(tmp_path / "out"), *resize, *ON_CPU,
    ])
    weights = tmp_path / "out" / "weights.safetensors"
    side = 12 if resize else 20
    images, model = data.load(str(folder), resize=side), load_weights(weights)
    plain = explain.predictions(model, images)
    assert plain.accuracy == read_history(tmp_path / "out")[-1]["test_acc"]

    capsys.readouterr()
    evaluate.main([*map(str, paths), "--weights", str(weights), *ON_CPU])
    weights_line, pictures_line, answers = capsys.readouterr().out.split("\n", 2)
    assert pictures_line == f"pictures the middle of each, resized to {side}×{side} pixels"
    expected = evaluate.likeliest(paths, plain.logits.softmax(1), plain.classes)
    assert answers == f"{expected}\n"

    evaluate.main(["--weights", str(weights), "--data", str(folder), *ON_CPU])
    assert f"test accuracy       {plain.accuracy:6.2f} %  of 9 images" in capsys.readouterr().out


def test_likeliest_classes_as_text():
    shares = torch.tensor([[0.0, 0.3, 0.5, 0.2], [0.9, 0.1, 0.0, 0.0]])
    text = evaluate.likeliest(["a.png", "b.png"], shares, ("cat", "dog", "automobile", "ship"), 2)
    assert text.splitlines() == [
        "", "a.png", "  automobile  50.00%", "  dog         30.00%",
        "", "b.png", "  cat         90.00%", "  dog         10.00%",
    ]


def test_a_picture_that_is_none_is_refused_in_one_line(out, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit, match="^error: [^\n]*text.png can't be read as [^\n]*$"):
        weights = str(out / "weights.safetensors")
        evaluate.main([str(tmp_path / "text.png"), "--weights", weights, *ON_CPU])


def test_weights_of_other_classes_are_refused_in_one_line(out, tmp_path):
    write_folder(tmp_path / "colours", train=1, test=1, side=8)
    for split in ("train", "test"):
        (tmp_path / "colours" / split / "red").rename(tmp_path / "colours" / split / "rouge")
    with pytest.raises(SystemExit, match="^error: [^\n]* red; [^\n]* blue, green, rouge: [^\n]*$"):
        evaluate.main([
            "--weights", str(out / "weights.safetensors"), "--data", str(tmp_path / "colours"),
            *ON_CPU,
        ])


def test_weights_that_are_not_there_are_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: no weights file [^\n]*$"):
        evaluate.main(["--weights", str(tmp_path / "none"), "--data", "sample", *ON_CPU])
