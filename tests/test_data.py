"""Sources of images, bad folders, statistics, and parts that are held out."""

import dataclasses
import hashlib
import http.client
import io
import os
import pickle
import struct
import sys
import tarfile
import urllib.error
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10

from conftest import tiny_images
from utils import InputError, data


def assert_refused(word, call, *args, **settings):
    """InputError in one line that names what is at fault."""
    with pytest.raises(InputError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert str(word) in message
    assert "\n" not in message and len(message) > 20
    return message


# Statistics


@settings(max_examples=100)
@given(arrays(np.uint8, array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_statistics_are_those_of_all_pixels(images):
    mean, std = data.channel_statistics(torch.from_numpy(images))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), scaled.mean((0, 2, 3)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(std.numpy(), scaled.std((0, 2, 3)), rtol=0, atol=1e-12)


def test_statistics_of_skewed_channels():
    generator = np.random.default_rng(0)
    shape = (50, 32, 32)
    channels = [
        generator.integers(0, 256, shape),
        255 * generator.beta(0.3, 4, shape),
        250 + 5 * (generator.random(shape) < 0.01),
    ]
    images = np.stack(channels, axis=1).astype(np.uint8)
    mean, std = data.channel_statistics(torch.from_numpy(images))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean.numpy(), scaled.mean((0, 2, 3)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(std.numpy(), scaled.std((0, 2, 3)), rtol=0, atol=1e-12)


def test_deviation_is_not_the_mean_of_each_images_own():
    """A black and a white image: neither has any deviation, together they have one half."""
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255)]).to(torch.uint8)
    assert data.channel_statistics(images)[1].tolist() == [0.5] * 3


def test_statistics_are_of_the_training_images_and_computed_once(monkeypatch):
    asked, compute = [], data.channel_statistics
    monkeypatch.setattr(
        data, "channel_statistics", lambda images: asked.append(images) or compute(images)
    )
    images = tiny_images()
    mean, std = images.statistics
    assert images.statistics is images.statistics
    assert len(asked) == 1 and asked[0] is images.train_images
    pixels = images.train_images.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)))
    torch.testing.assert_close(std, pixels.std((0, 2, 3), correction=0))


def test_a_constant_channel_counts_as_of_deviation_1():
    """By 0 the images could not be divided."""
    images = tiny_images()
    images.train_images[:, 2] = 77
    mean, std = images.statistics
    normal = data.Normalization(mean, std)(images.train_images)
    assert std[2] == 1 and normal[:, 2].abs().max() < 1e-6
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]))


# The built-in sample


@pytest.fixture(scope="module")
def sample():
    return data.load("sample")


def test_sample(sample):
    for images, labels in (
        (sample.train_images, sample.train_labels),
        (sample.test_images, sample.test_labels),
    ):
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, 32, 32)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))
    assert len(sample.classes) == 10
    assert sample.epochs and sample.batch_size
    assert "not CIFAR-10" in sample.name and sample.name in str(sample)


def test_fingerprint_is_stable(sample):
    """Recorded runs are known by theirs."""
    assert data.load("sample").fingerprint == sample.fingerprint
    images = torch.arange(36, dtype=torch.uint8).view(3, 3, 2, 2)
    labels = torch.tensor([0, 1, 0])
    known = data.ImageData("any", ("a", "b"), images, labels, images[:2], labels[:2])
    assert known.fingerprint == "de8bf6b8c099a08b"


@pytest.mark.parametrize(
    "part", ["train_images", "train_labels", "test_images", "test_labels", "classes"]
)
def test_fingerprint_changes_with_any_value_and_with_the_order(sample, part):
    value = getattr(sample, part)
    if part == "classes":
        changes = [(*value[:-1], "another"), value[::-1]]
    else:
        changes = [value.clone(), value.roll(1, 0)]
        changes[0].view(-1)[-1] = (value.view(-1)[-1] + 1) % 10
    for changed in changes:
        assert dataclasses.replace(sample, **{part: changed}).fingerprint != sample.fingerprint


# Folders of pictures


def picture(seed, height=40, width=36):
    """uint8 (H, W, 3), smooth, and another one when it is mirrored or transposed."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5, columns * 7 % 256, rows + columns + seed], 2).astype(np.uint8)


def write(path, array, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    quality = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(array).convert(mode).save(path, **quality)


@pytest.fixture
def folder(tmp_path):
    """Three classes: train/ has 3, 2 and 2 pictures, test/ one each."""
    root = tmp_path / "animals"
    for seed, name in enumerate(["cat/0", "cat/1", "cat/2", "emu/0", "emu/1", "yak/0", "yak/1"]):
        write(root / "train" / f"{name}.png", picture(seed))
    for seed, name in enumerate(["cat/a", "emu/a", "yak/a"]):
        write(root / "test" / f"{name}.png", picture(100 + seed))
    return root


def test_folder(folder):
    images = data.load(str(folder))
    assert images.classes == ("cat", "emu", "yak")
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert images.test_labels.tolist() == [0, 1, 2]
    assert images.train_images.dtype == torch.uint8
    for seed, image in [*enumerate(images.train_images), *enumerate(images.test_images, 100)]:
        assert torch.equal(image, torch.from_numpy(picture(seed)).permute(2, 0, 1))
    assert "animals" in images.name and "40×36" in str(images)
    assert images.epochs is None and images.batch_size is None


def test_folder_of_jpg_grey_palette_and_transparent_pictures(folder):
    write(folder / "train/cat/1.png", picture(1), "L")
    write(folder / "train/cat/2.png", picture(2), "RGBA")
    (folder / "train/emu/0.png").unlink()
    write(folder / "train/emu/0.jpg", picture(3))
    palette = Image.new("P", (36, 40), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.putpixel((35, 0), 0)  # the top right corner
    palette.save(folder / "train/emu/1.png")

    images = data.image_folder(folder).train_images
    luma = picture(1) @ [0.299, 0.587, 0.114]
    assert (images[1].double() - torch.from_numpy(luma)).abs().max() <= 1
    assert torch.equal(images[2], torch.from_numpy(picture(2)).permute(2, 0, 1))
    assert (images[3].int() - torch.from_numpy(picture(3)).permute(2, 0, 1)).abs().max() <= 3
    assert images[4, :, 0, 35].tolist() == [0, 0, 0]
    assert images[4].flatten(1)[:, :35].unique(dim=1).squeeze().tolist() == [10, 200, 30]


def test_missing_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", data.load, str(tmp_path / "nowhere"))


def test_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", data.load, str(tmp_path / "file"))


def test_empty_folder(tmp_path):
    assert_refused(tmp_path / "train", data.load, str(tmp_path))


def test_folder_without_test(folder):
    (folder / "test").rename(folder / "check")
    assert_refused(folder / "test", data.load, str(folder))


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_in_one_split_only(folder, split):
    write(folder / split / "ape" / "0.png", picture(0))
    assert_refused("ape", data.load, str(folder))


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_without_pictures(folder, split):
    for file in (folder / split / "emu").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert_refused("emu", data.load, str(folder))


def test_text_that_is_named_as_a_picture(folder):
    (folder / "train/emu/0.png").write_text("not a picture")
    assert_refused(folder / "train/emu/0.png", data.load, str(folder))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_truncated_picture(folder, suffix, share):
    path = folder / "test/yak" / f"z{suffix}"
    write(path, np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(path, data.load, str(folder))


def test_picture_with_a_broken_header(folder):
    path = folder / "test/yak/z.ppm"
    path.write_bytes(b"P6\n36 x")
    assert_refused(path, data.load, str(folder))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """2,002 pictures which are large, so that reading them takes a while, but their files small."""
    root = tmp_path_factory.mktemp("many")
    write(root / "train/ape/0.png", np.zeros((300, 300, 3), np.uint8))
    content = (root / "train/ape/0.png").read_bytes()
    for name in [f"train/bee/{i:04}" for i in range(2000)] + ["test/ape/0", "test/bee/0"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").write_bytes(content)
    return root


@pytest.mark.parametrize("damage", ["broken", "another size"])
def test_after_a_bad_first_picture_the_others_are_not_read(many, monkeypatch, damage):
    """As in a terminal: a bar that is not shown would tell the threads by itself to stop."""
    monkeypatch.setattr(data, "progress_bar", partial(data.progress_bar, disable=False))
    first = many / "train/ape/0.png"
    good = first.read_bytes()
    read, original = [], data.read_picture
    monkeypatch.setattr(
        data, "read_picture", lambda name, size: read.append(name) or original(name, size)
    )
    try:
        if damage == "broken":
            first.write_bytes(b"")
            assert_refused(first, data.load, str(many))
        else:
            write(first, picture(0))
            assert_refused("36×40", data.load, str(many))
    finally:
        first.write_bytes(good)
    assert len(read) < 1000


@pytest.mark.parametrize("name", ["train/emu/1.png", "test/cat/a.png"])
def test_pictures_of_different_sizes(folder, name):
    write(folder / name, picture(0, height=36, width=40))
    message = assert_refused(folder / name, data.load, str(folder))
    assert "40×36" in message and "36×40" in message and "--resize" in message


def test_photographs_of_any_sizes_are_resized_where_that_is_asked_for(folder):
    paths = sorted(folder.rglob("*.png"))
    for i, path in enumerate(paths):
        write(path.with_suffix(".jpg"), picture(i, height=30 + 17 * i, width=90 - 5 * i))
        path.unlink()
    images = data.load(str(folder), resize=24)
    assert images.size == (24, 24)
    every = torch.cat([images.test_images, images.train_images])
    for path, image in zip(paths, every, strict=True):
        assert torch.equal(image, data.read_picture(path.with_suffix(".jpg"), (24, 24)))
    assert data.load(str(folder), resize=(20, 40)).train_images.shape == (7, 3, 20, 40)


@pytest.mark.parametrize("resize", [0, 7, -1, (7, 9)])
def test_a_size_that_is_too_small(folder, resize):
    assert_refused("at least 8", data.load, str(folder), resize=resize)


def test_only_a_folder_is_resized(sample, monkeypatch):
    monkeypatch.setattr(data, "builtin_sample", lambda: sample)
    assert data.load("sample", resize=32) is sample
    assert_refused("only the pictures of a folder", data.load, "sample", resize=64)


def test_pictures_that_do_not_fit_into_memory(folder, monkeypatch):
    def empty(shape, **_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", empty)
    message = assert_refused("7 pictures", data.load, str(folder))
    assert "memory" in message and "--resize" in message


# A folder is taken as it is meant


def test_what_is_hidden_or_no_picture_is_left_out_and_said(folder, capsys):
    expected = data.load(str(folder)).fingerprint
    assert capsys.readouterr().out == ""
    write(folder / "train/.ipynb_checkpoints/a.png", picture(0))
    write(folder / "train/cat/.ipynb_checkpoints/a.png", picture(0))
    write(folder / "train/cat/._0.png", picture(0))
    (folder / "test/notes.png").write_text("no class")
    write(folder / "test/yak/more/a.png", picture(0))
    (folder / "test/yak/Thumbs.db").write_text("no picture")
    assert data.load(str(folder)).fingerprint == expected
    said = capsys.readouterr().out
    some = "train/.ipynb_checkpoints", "train/cat/._0.png", "train/cat/.ipynb_checkpoints"
    assert said.startswith("left out 6: ")
    assert said.endswith(" ".join(["", *(str(folder / name) for name in some)]) + "\n")


@pytest.mark.parametrize("ending", ["jfif", "JPG", "webp", "jpe", "tga", "gif", "ppm"])
def test_endings_of_pictures(folder, ending, capsys):
    Image.fromarray(picture(9)).save(
        folder / f"train/emu/z.{ending}", format="JPEG" if ending == "jfif" else None
    )
    assert data.load(str(folder)).train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert capsys.readouterr().out == ""


def test_classes_a_level_too_deep(tmp_path):
    for split in ("train", "test"):
        for name in ("animals/cat", "animals/emu", "plants/oak"):
            write(tmp_path / split / name / "0.png", picture(0))
    assert_refused(tmp_path / "train/animals", data.load, str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
def test_a_class_whose_name_is_no_text(folder):
    """As from an old archive: "café" in Latin-1."""
    for split in ("train", "test"):
        os.rename(folder / split / "cat", os.fsencode(folder / split) + b"/caf\xe9")
    images = data.image_folder(folder)
    assert "caf\udce9" in images.classes and len(images.fingerprint) == 16


def test_the_home_folder_is_meant_by_its_short_name(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    images = data.image_folder(f"~/{folder.name}")
    assert images.fingerprint == data.image_folder(folder).fingerprint


def test_a_class_is_the_same_in_both_forms_of_unicode(folder):
    for split, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        (folder / split / "emu").rename(folder / split / name)
    images = data.load(str(folder))
    assert images.classes == ("caf\u00e9", "cat", "yak")
    assert images.train_labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert torch.equal(images.test_images[0], torch.from_numpy(picture(101)).permute(2, 0, 1))


@pytest.mark.parametrize("source, size", [("folder", (40, 36)), ("sample", (32, 32))])
def test_training_pictures_can_be_left_out(folder, source, size):
    source = str(folder) if source == "folder" else source
    images, whole = data.load(source, train=False), data.load(source)
    assert images.train_images.shape == (0, 3, *size) and images.train_labels.shape == (0,)
    assert images.train_labels.dtype == torch.int64 and "×".join(map(str, size)) in str(images)
    assert torch.equal(images.test_images, whole.test_images)
    assert torch.equal(images.test_labels, whole.test_labels)


def test_folder_of_a_single_class(folder):
    for split in ("train", "test"):
        for name in ("emu", "yak"):
            (folder / split / name).rename(folder / f"{split}-{name}")
    assert_refused("at least two", data.load, str(folder))


def test_folder_we_are_in_is_called_by_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert data.load(".").name == data.load("../animals").name == "the folder animals"


# CIFAR-10


@pytest.fixture
def archive(monkeypatch):
    """A CIFAR-10 of twelve images, whose checksums torchvision expects: its bytes, its images."""
    files = {"batches.meta": {"label_names": list("abcdefghij")}}
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for k, name in enumerate(names):
        files[name] = {"data": pixels[k], "labels": [k, 9 - k]}
    packed, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            content = pickle.dumps(content)
            sums[name] = hashlib.md5(content).hexdigest()
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], sums[names[5]]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    return packed.getvalue(), torch.from_numpy(pixels).view(12, 3, 32, 32)


class Response(io.BytesIO):
    """What urlopen gives. With `error`, it is raised after the content instead of an end."""

    url = None

    def __init__(self, content, error=None):
        super().__init__(content)
        self.length, self.error = len(content), error

    def read(self, *size):
        chunk = super().read(*size)
        if not chunk and self.error:
            raise self.error
        return chunk


@pytest.fixture
def serve(monkeypatch):
    def set_answer(answer):
        def urlopen(*_, **__):
            if isinstance(answer, Exception):
                raise answer
            return Response(*answer)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)

    return set_answer


NO_NETWORK = urllib.error.URLError("no network here")


def test_cifar10_is_downloaded_once(archive, serve, tmp_path):
    content, pixels = archive
    serve([content])
    images = data.load("cifar10", root=tmp_path)
    serve(NO_NETWORK)
    again = data.load("cifar10", root=tmp_path)
    assert images.name == "CIFAR-10" and images.classes == tuple("abcdefghij")
    assert torch.equal(images.train_images, pixels[:10])
    assert torch.equal(images.test_images, pixels[10:])
    assert images.train_labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert images.test_labels.tolist() == [5, 4]
    assert images.fingerprint == again.fingerprint


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_cifar10_is_mended(archive, serve, tmp_path, damage):
    content, pixels = archive
    serve([content])
    data.load("cifar10", root=tmp_path)
    file = tmp_path / CIFAR10.base_folder / "data_batch_3"
    if damage == "changed":
        file.write_bytes(b"?" + file.read_bytes()[1:])
    else:
        file.unlink()
    assert torch.equal(data.load("cifar10", root=tmp_path).train_images, pixels[:10])


@pytest.mark.parametrize(
    "answer, word",
    [
        (NO_NETWORK, "no network here"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.HTTPError("http://x", 503, "unavailable", None, None), "503"),
        ([b"x" * 1000, http.client.IncompleteRead(b"")], "IncompleteRead"),
        ([b"x" * 1000, ConnectionResetError("reset")], "reset"),
        ([b"not the archive"], "corrupted"),
    ],
    ids=["no network", "timeout", "server error", "cut off", "reset", "other content"],
)
def test_failed_download_is_reported_and_does_not_hinder_the_next(
    archive, serve, tmp_path, answer, word
):
    serve(answer)
    message = assert_refused(word, data.load, "cifar10", root=tmp_path / "data")
    assert "--data" in message
    serve([archive[0]])
    assert torch.equal(data.load("cifar10", root=tmp_path / "data").test_images, archive[1][10:])


@pytest.mark.skipif(
    "CIFAR10_DIR" not in os.environ,
    reason="set CIFAR10_DIR to a folder with CIFAR-10 as train/<class>/* and test/<class>/*",
)
def test_statistics_of_cifar10():
    images = data.load(os.environ["CIFAR10_DIR"])
    assert len(images.train_images) == 50_000 and len(images.test_images) == 10_000
    mean, std = images.statistics
    assert [round(value, 4) for value in mean.tolist()] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in std.tolist()] == [0.2470, 0.2435, 0.2616]


# Validation split


@settings(max_examples=100)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    fraction=st.floats(0, 1),
)
def test_validation_split_takes_its_share_of_each_class(counts, fraction):
    labels = torch.repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    chosen = data.validation_split(labels, fraction)
    assert chosen.shape == labels.shape and chosen.dtype == torch.bool
    drawn = labels[chosen].bincount(minlength=len(counts)).tolist()
    assert drawn == [round(fraction * count) for count in counts]
    assert torch.equal(chosen, data.validation_split(labels, fraction))


def test_validation_split_is_the_same_whatever_was_drawn_before():
    labels = torch.arange(1000) % 10
    chosen = data.validation_split(labels, 0.1)
    torch.manual_seed(7)
    assert torch.equal(chosen, data.validation_split(labels, 0.1))
    first = chosen.nonzero().squeeze(1)
    assert len(first) == 100
    places = [first[labels[first] == label] // 10 for label in range(10)]
    assert not torch.equal(places[0], places[1]), "the same draw for each class"


def test_hold_out_keeps_the_test_images_out(sample):
    held = data.hold_out(sample)
    chosen = data.validation_split(sample.train_labels, 0.1)
    assert torch.equal(held.train_images, sample.train_images[~chosen])
    assert torch.equal(held.train_labels, sample.train_labels[~chosen])
    assert torch.equal(held.test_images, sample.train_images[chosen])
    assert torch.equal(held.test_labels, sample.train_labels[chosen])
    assert "held-out" in held.name and held.fingerprint != sample.fingerprint
    assert (held.epochs, held.batch_size) == (sample.epochs, sample.batch_size)


def test_half_the_size_is_the_mean_of_four(sample):
    halved = data.halve(sample)
    blocks = sample.test_images[:7].numpy().astype(float).reshape(7, 3, 16, 2, 16, 2)
    expected = np.rint(blocks.mean(axis=(3, 5)))
    assert np.array_equal(halved.test_images[:7].numpy(), expected)
    assert halved.train_images.shape == (len(sample.train_images), 3, 16, 16)
    assert halved.train_images.dtype == torch.uint8
    assert halved.train_labels is sample.train_labels
    assert halved.validation_images is None
    halved = data.halve(data.with_validation(sample))
    assert halved.validation_images.shape == (len(halved.validation_labels), 3, 16, 16)


# A picture, in training and when asked


def saved(path, pixels, **settings):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **settings)
    return path


def test_a_picture_of_the_right_size_stays_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3))
    path = saved(tmp_path / "a.png", pixels)
    for size in (None, (32, 40)):
        found = data.read_picture(path, size)
        assert found.dtype == torch.uint8
        assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)


def test_a_picture_is_seen_by_its_middle_square(tmp_path):
    """What lies left and right of it is not seen, but for the reach of the resampling."""
    pixels = np.zeros((64, 192, 3))
    pixels[:, 60:132] = 200
    assert (data.read_picture(saved(tmp_path / "a.png", pixels), (32, 32)) == 200).all()


def test_a_picture_is_resampled_once(tmp_path):
    """Also where its middle square lies between the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 97, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((32, 32), box=(16.5, 0, 80.5, 64))
    found = data.read_picture(saved(tmp_path / "a.png", pixels), (32, 32))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_a_large_photograph_is_not_decoded_at_its_full_size(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.jpg", picture(0, 1500, 2000), quality=95)
    with Image.open(path) as whole:
        expected = np.asarray(ImageOps.fit(whole, (32, 32)))
    prepared, sizes = data._prepared, []

    def watched(opened, size):
        image = prepared(opened, size)
        sizes.append(opened.size)
        return image

    monkeypatch.setattr(data, "_prepared", watched)
    found = data.read_picture(path, (32, 32)).permute(1, 2, 0).numpy()
    assert sizes == [(500, 375)]
    assert np.abs(found.astype(int) - expected).max() <= 1


def turned_a_quarter(fraction):
    """Exif in bytes: orientation 6, turn clockwise; and `fraction`/0, which Pillow only reads."""
    entries = (0x0112, 3, 1, 6), (0x9204, 10, 1, 38)
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + packed + struct.pack("<Iii", 0, fraction, 0)


@pytest.mark.parametrize("suffix, fraction", [
    (".jpg", 1), (".jpg", -1), (".png", 1), (".png", -1), (".webp", 1), (".webp", -1),
    (".tif", None),
])
def test_a_picture_is_turned_as_the_camera_was_held(tmp_path, suffix, fraction):
    """Whatever else the camera has noted."""
    pixels = np.zeros((32, 16, 3))
    pixels[:16] = 250  # the upper half, which becomes the right one
    exif = Image.Exif()
    exif[0x0112] = 6
    if fraction:
        exif = turned_a_quarter(fraction)
    path = saved(tmp_path / f"a{suffix}", pixels, exif=exif)
    for size in (None, (16, 32)):
        found = data.read_picture(path, size)
        assert found.shape == (3, 16, 32)
        assert (found[..., 20:] > 240).all() and (found[..., :12] < 9).all()


@pytest.mark.parametrize("mode, value, expected", [
    ("L", 77, [77] * 3), ("RGBA", (0, 0, 0, 0), [255] * 3), ("RGBA", (9, 8, 7, 255), [9, 8, 7]),
    ("RGBA", (255, 0, 0, 51), [255, 204, 204]), ("LA", (0, 51), [204] * 3),
    ("1", 1, [255] * 3), ("P", 0, [0] * 3), ("CMYK", (0, 0, 0, 0), [255] * 3),
    ("I;16", 1000, [4] * 3), ("I;16", 65535, [255] * 3), ("I;16B", 25700, [100] * 3),
    ("I", 25700, [100] * 3), ("F", 0.2, [51] * 3),
])
def test_a_picture_of_any_mode(tmp_path, mode, value, expected):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I", "I;16B") else "a.png")
    Image.new(mode, (40, 50), value).save(path)
    for size in (None, (8, 8)):
        found = data.read_picture(path, size)
        assert found.flatten(1).unique(dim=1).flatten().tolist() == expected


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    picture = Image.new("P", (9, 9), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.gif", transparency=0)
    found = data.read_picture(tmp_path / "a.gif")
    assert found[:, 0, 0].tolist() == [255] * 3 and found[:, 8, 8].tolist() == [10, 200, 30]


@pytest.mark.parametrize("mode, value", [("F", 1.5), ("F", np.nan), ("I", 70_000), ("I", -1)])
def test_values_of_unknown_scale(tmp_path, mode, value):
    Image.new(mode, (9, 9), value).save(tmp_path / "a.tif")
    message = assert_refused(tmp_path / "a.tif", data.read_picture, tmp_path / "a.tif")
    assert message.endswith("save it with 8 bits a channel")


def test_pictures_that_can_not_be_seen(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = saved(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 256, (99, 99, 3)))
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:2000])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name in ("text.png", "empty.png", "cut.jpg", "bomb.png", ""):
        with pytest.raises(InputError, match=f"^[^\n]*{name} can't be read [^\n]*omit it$"):
            data.read_picture(tmp_path / name, (32, 32))


def test_a_picture_that_does_not_exist(tmp_path):
    message = assert_refused("none.png", data.read_picture, tmp_path / "none.png")
    assert "exists" in message and "delete" not in message


Image.init()
FORMATS = {"PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "DDS", "ICO", "TGA", "PPM", "PCX", "SGI",
           "JPEG2000", "IM"} | ({"AVIF"} & Image.SAVE.keys())  # which newer Pillows have


@pytest.mark.filterwarnings("ignore")  # Pillow's, on what it has found
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_damaged_pictures_are_seen_or_refused(tmp_path, monkeypatch, format):
    """Whatever the decoder says of them."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # else some become huge
    generator = np.random.default_rng(0)
    path = tmp_path / "a"
    Image.fromarray(picture(0, 64, 64)).save(path, format=format)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(30):
        damaged = whole.copy()
        places = generator.integers(0, len(whole), 5)
        damaged[places] = generator.integers(0, 256, 5)
        path.write_bytes(damaged[: generator.integers(1, 2 * len(whole))].tobytes())
        try:
            found = data.read_picture(path, (8, 8))
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert found.shape == (3, 8, 8)


def test_a_kind_of_dds_that_pillow_can_not_decode(tmp_path):
    path = tmp_path / "a.dds"
    Image.fromarray(picture(0)).save(path)
    content = bytearray(path.read_bytes())
    content[80:88] = struct.pack("<I4s", 4, b"ATC ")  # compressed, by a method it does not know
    path.write_bytes(content)
    assert_refused(path, data.read_picture, path)


def test_of_an_animation_the_first_picture_is_seen(tmp_path):
    frames = [Image.new("RGB", (9, 9), (value,) * 3) for value in (10, 250)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert data.read_picture(tmp_path / "moving.gif", (32, 32)).unique().tolist() == [10]
