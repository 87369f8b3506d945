"""Weights files, and what is made of them: accuracy, test-time flip, calibration, left out."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import ON_CPU, read_history, without_figures, write_folder
from torch import nn

from utils import InputError, data, evaluate, models, train, training
from utils.models import CustomResNet, load_weights

METADATA = {
    "recipe": "s10", "seed": 3, "model": "small", "fc_bias": True,
    "classes": ["blue", "green", "red"],
    "mean": [0.5, 0.25, 0.125], "std": [0.1, 0.2, 0.30000000000000004], "data": "0123",
}


class Small(CustomResNet):
    """Of the same kind, but without its 26 MB."""

    def __init__(self, num_classes, *, fc_bias=True):
        nn.Module.__init__(self)
        self.prep = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, num_classes, bias=fc_bias)

    def forward(self, x):
        return self.fc(self.prep(x).amax(dim=(2, 3)))


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", Small)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures") / "colours", train=8, test=5)


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """The folder of a run of one epoch."""
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        train.main([
            "s10", "--data", str(folder), "--epochs", "1", "--set", "batch_size=8",
            "--out", str(out), *ON_CPU,
        ])
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of untrained weights, and its network."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    torch.manual_seed(0)
    model = Small(3)
    training.save_weights(model, path, metadata=METADATA)
    return path, model


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


# Weights files


def test_file_is_the_network(weights):
    path, model = weights
    loaded = CustomResNet.from_pretrained(path)
    assert type(loaded) is Small and not loaded.training
    assert loaded.prep[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.classes == ("blue", "green", "red")
    assert loaded.mean == (0.5, 0.25, 0.125)
    assert loaded.std == (0.1, 0.2, 0.30000000000000004)
    assert loaded.metadata == METADATA


def test_same_weights_same_bytes(weights, tmp_path):
    path, model = weights
    for i in range(5):
        training.save_weights(model, tmp_path / str(i), metadata=dict(sorted(METADATA.items())))
        assert (tmp_path / str(i)).read_bytes() == path.read_bytes()
    assert load_file(path).keys() == model.state_dict().keys()


def test_half_precision(weights, tmp_path):
    _, model = weights
    training.save_weights(model, tmp_path / "half", metadata=METADATA, dtype=torch.float16)
    with safe_open(tmp_path / "half", framework="pt") as file:
        assert file.get_tensor("fc.weight").dtype == torch.float16
    loaded = load_weights(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], expected), name


def test_too_large_for_half_precision(tmp_path):
    model = nn.Linear(1, 1)
    model.bias.data.fill_(70000)
    with pytest.raises(InputError, match="^bias is too large for torch.float16"):
        training.save_weights(model, tmp_path / "half", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_without_a_bias(tmp_path):
    model = Small(3, fc_bias=False)
    training.save_weights(model, tmp_path / "w", metadata={**METADATA, "fc_bias": False})
    assert load_weights(tmp_path / "w").fc.bias is None


def test_shipped_weights_are_the_default(weights, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED_WEIGHTS", weights[0])
    assert CustomResNet.from_pretrained().metadata == METADATA


def test_no_shipped_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED_WEIGHTS", tmp_path / "none")
    with pytest.raises(InputError, match=r"^no trained weights .* utils\.train wrote$"):
        CustomResNet.from_pretrained()


def test_another_network(weights):
    class Other(CustomResNet):
        pass

    with pytest.raises(InputError, match=r"of a Small; use Small\.from_pretrained$"):
        Other.from_pretrained(weights[0])


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:100], lambda content: b"",
    lambda content: b"epoch,lr\n1,0.1\n",
], ids=["cut", "cut in the header", "empty", "a table"])
def test_damaged_file(weights, tmp_path, damage):
    (tmp_path / "w").write_bytes(damage(weights[0].read_bytes()))
    with pytest.raises(InputError, match="w is damaged or no safetensors file; [^\n]*$"):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize("changes", [
    {"classes": None}, {"mean": None}, {"std": [1, 2]}, {"mean": 0.5}, {"classes": "blue"},
    {"classes": ["blue", "red"]}, {"fc_bias": False}, {"model": "another"},
], ids=str)
def test_file_of_something_else(weights, tmp_path, changes):
    training.save_weights(weights[1], tmp_path / "w", metadata={**METADATA, **changes})
    with pytest.raises(InputError, match="w does not hold a network of ours[^\n]*$"):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize("tensors", [
    {}, {"weight": torch.zeros(2)}, {"fc.bias": torch.zeros(4)}, {"prep.0.weight": None},
], ids=["none", "one more", "another shape", "one less"])
def test_other_tensors(weights, tmp_path, tensors):
    tensors = {**load_file(weights[0]), **tensors} if tensors else {}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "w", {"run": json.dumps(METADATA)})
    with pytest.raises(InputError, match="w does not hold a network of ours[^\n]*$"):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize("about", [None, {"run": "blue"}, {"run": "[]"}], ids=str)
def test_file_that_does_not_tell_of_its_run(weights, tmp_path, about):
    save_file(load_file(weights[0]), tmp_path / "w", about)
    with pytest.raises(InputError, match="w does not hold a network of ours[^\n]*$"):
        load_weights(tmp_path / "w")


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="^no weights file .*none; name one"):
        load_weights(tmp_path / "none")


def test_run_tells_of_itself(out, folder):
    images = data.load(str(folder))
    model = load_weights(out / "weights.safetensors")
    pixels = images.train_images.double() / 255
    assert type(model) is CustomResNet
    assert model.classes == images.classes == ("blue", "green", "red")
    assert model.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert model.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-9)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert model.metadata["data"] == images.fingerprint == metrics["data"]["fingerprint"]
    assert [model.metadata[name] for name in ("recipe", "seed", "fc_bias")] == ["s10", 0, True]
    assert metrics["data"]["mean"] == list(model.mean)
    assert metrics["data"]["std"] == list(model.std)


# Evaluation


def test_accuracy_is_that_of_the_run(out, folder, tmp_path, capsys):
    evaluate.main([
        "--weights", str(out / "weights.safetensors"), "--data", str(folder), *ON_CPU,
        "--json", str(tmp_path / "new" / "result.json"),
    ])
    result = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert result["accuracy"] == result["accuracy_exact"] == read_history(out)[-1]["test_acc"]
    assert (result["images"], result["left_out"]) == (15, 0)
    assert list(result["per_class"]) == ["blue", "green", "red"]
    assert sum(result["per_class"].values()) / 3 == pytest.approx(result["accuracy"])
    assert f"test accuracy{result['accuracy']:20.2f} %" in capsys.readouterr().out


def test_flip_accuracy_by_hand(out, folder, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    images = data.load(str(folder))
    model = load_weights(out / "weights.safetensors")
    x = images.test_images.float() / 255
    x = (x - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    with torch.inference_mode():
        logits = (model(x) + model(x.flip(3))) / 2
    expected = 100 * (logits.argmax(1) == images.test_labels).sum().item() / 15
    result = evaluate.evaluate(model, images.test_images, images.test_labels)
    assert result["accuracy_flip"] == expected


def test_figures_by_hand():
    """The mirror image decides the second, and outvotes the first's right answer."""
    images = torch.stack([
        two_halves((100, 50, 0), (0, 250, 0)),  # a; mirrored b; both b
        two_halves((100, 50, 0), (0, 250, 0)),
        two_halves((0, 0, 200), (0, 0, 200)),  # c
        two_halves((0, 250, 0), (0, 0, 0)),  # b
    ])
    labels = torch.tensor([0, 1, 2, 0])
    left_out = {data.fingerprints(images)[3], "0" * 16}
    result = evaluate.evaluate(ByColour(), images, labels, left_out=left_out)
    error = result.pop("calibration_error")
    assert result == {
        "images": 4, "left_out": 1,
        "accuracy": 50.0, "accuracy_exact": 200 / 3,
        "accuracy_flip": 50.0, "accuracy_flip_exact": 200 / 3,
        "per_class": {"a": 50.0, "b": 0.0, "c": 100.0},
    }
    # Confidences of a, twice, once right; of c, right; of b, wrong: three bins.
    levels = torch.tensor([[100, 50, 0], [0, 0, 200], [0, 250, 0]]) / 255 * 10
    first, second, third = levels.softmax(1).amax(1).tolist()
    bins = [int(15 * confidence) for confidence in (first, second, third)]
    assert bins == [12, 14, 14]
    expected = (abs(2 * first - 1) + abs(second + third - 1)) / 4
    assert error == pytest.approx(100 * expected, rel=1e-5)


def test_flip_counts_both_views():
    images = torch.stack([two_halves((100, 50, 0), (0, 250, 0))] * 2)
    result = evaluate.evaluate(ByColour(), images, torch.tensor([0, 0]))
    assert (result["accuracy"], result["accuracy_flip"]) == (100.0, 0.0)


def test_report_names_both_counts():
    result = {
        "images": 10000, "left_out": 20, "accuracy": 87.1, "accuracy_exact": 87.11,
        "accuracy_flip": 88.0, "accuracy_flip_exact": 88.01, "calibration_error": 2.5,
        "per_class": {"cat": 75.0, "automobile": 100.0},
    }
    assert evaluate.report(result).splitlines() == [
        "                      10,000 images     9,980 (without 20 left out)",
        "test accuracy               87.10 %   87.11 %",
        "with test-time flip         88.00 %   88.01 %",
        "calibration error            2.50 %  (ECE, 15 bins)",
        "",
        "cat         75.00 %",
        "automobile 100.00 %",
    ]


def test_all_left_out():
    images = torch.zeros(2, 3, 2, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="^all images are left out"):
        evaluate.evaluate(
            ByColour(), images, torch.tensor([0, 0]), left_out=data.fingerprints(images)
        )


def test_other_classes(weights, tmp_path):
    write_folder(tmp_path / "colours", train=1, test=1)
    (tmp_path / "colours/train/red").rename(tmp_path / "colours/train/rouge")
    (tmp_path / "colours/test/red").rename(tmp_path / "colours/test/rouge")
    with pytest.raises(SystemExit, match="^error: .* blue, green, red; .* blue, green, rouge: "):
        evaluate.main(["--weights", str(weights[0]), "--data", str(tmp_path / "colours"), *ON_CPU])


# Fingerprints


def test_fingerprints():
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 3, 2, 2)
    # what sha256sum says of the bytes 0 to 11, and 12 to 23
    assert data.fingerprints(images) == ["fff3a9bcdd37363d", "34d169384e157254"]
    assert data.fingerprints(images.flip(0)) == data.fingerprints(images)[::-1]


def test_list_of_fingerprints(tmp_path):
    (tmp_path / "list").write_text("# a comment\n\n0123456789abcdef  # a ship\nfedcba9876543210\n")
    found = data.read_fingerprints(tmp_path / "list")
    assert found == {"0123456789abcdef", "fedcba9876543210"}


@pytest.mark.parametrize("content", ["12\n", "0123456789abcdeg\n", "0123456789abcdef0\n"])
def test_bad_list_of_fingerprints(tmp_path, content):
    (tmp_path / "list").write_text(content)
    with pytest.raises(InputError, match=f"list: '{content.strip()}' is no fingerprint"):
        data.read_fingerprints(tmp_path / "list")


def test_no_list_of_fingerprints(tmp_path):
    with pytest.raises(InputError, match="^can't read .*list; "):
        data.read_fingerprints(tmp_path / "list")


def test_training_pictures_can_be_left_unread(folder):
    images, whole = data.load(str(folder), train=False), data.load(str(folder))
    assert images.train_images.shape == (0, 3, 32, 32) and images.train_labels.shape == (0,)
    assert images.train_labels.dtype == torch.int64
    assert torch.equal(images.test_images, whole.test_images)
    assert torch.equal(images.test_labels, whole.test_labels)
