"""Sources of images, bad folders, splits, and loaders that depend on seed and epoch alone."""

import dataclasses
import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import CIFAR10

from utils import InputError, data
from utils.transforms import BatchTransform, albumentations_pipeline, channel_statistics

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def assert_refused(word, call, *args, **settings):
    """InputError in one line that names what is at fault."""
    with pytest.raises(InputError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert str(word) in message
    assert "\n" not in message and len(message) > 20
    return message


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
    assert data.load("sample").fingerprint == sample.fingerprint
    assert len(sample.fingerprint) == 16 and int(sample.fingerprint, 16)


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


def test_first_picture_broken(folder):
    (folder / "train/cat/0.png").write_bytes(b"")
    assert_refused(folder / "train/cat/0.png", data.load, str(folder))


@pytest.mark.parametrize("name", ["train/emu/1.png", "test/cat/a.png"])
def test_pictures_of_different_sizes(folder, name):
    write(folder / name, picture(0, height=36, width=40))
    message = assert_refused(folder / name, data.load, str(folder))
    assert "40×36" in message and "36×40" in message


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
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_cifar10_is_downloaded_again(archive, serve, tmp_path, damage):
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
        ([b"not the archive"], "checksum"),
    ],
    ids=["no network", "timeout", "server error", "cut off", "reset", "other content"],
)
def test_failed_download_leaves_nothing_behind(serve, tmp_path, answer, word):
    serve(answer)
    message = assert_refused(word, data.load, "cifar10", root=tmp_path / "data")
    assert "--data" in message
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.skipif(
    "CIFAR10_DIR" not in os.environ,
    reason="set CIFAR10_DIR to a folder with CIFAR-10 as train/<class>/* and test/<class>/*",
)
def test_statistics_of_cifar10():
    images = data.load(os.environ["CIFAR10_DIR"])
    assert len(images.train_images) == 50_000 and len(images.test_images) == 10_000
    mean, std = channel_statistics(images.train_images)
    assert [round(value, 4) for value in mean.tolist()] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in std.tolist()] == [0.2470, 0.2435, 0.2616]


# Validation split


@settings(deadline=None, max_examples=100)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_validation_split_takes_its_share_of_each_class(counts, fraction, seed):
    labels = torch.repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    train, validation = data.validation_split(labels, fraction=fraction, seed=seed)
    assert sorted(train.tolist() + validation.tolist()) == list(range(len(labels)))
    drawn = labels[validation].bincount(minlength=len(counts)).tolist()
    assert drawn == [round(fraction * count) for count in counts]
    again = data.validation_split(labels, fraction=fraction, seed=seed)
    assert torch.equal(train, again[0]) and torch.equal(validation, again[1])


def test_validation_split_is_drawn_by_its_seed_alone():
    labels = torch.arange(1000) % 10
    first = data.validation_split(labels, seed=0)[1]
    torch.manual_seed(7)
    assert torch.equal(first, data.validation_split(labels, seed=0)[1])
    assert not torch.equal(first, data.validation_split(labels, seed=1)[1])
    assert len(first) == 100
    places = [first[labels[first] == label] // 10 for label in range(10)]
    assert not torch.equal(places[0], places[1]), "the same draw for each class"


def test_hold_out_keeps_the_test_images_out(sample):
    held = data.hold_out(sample, fraction=0.2, seed=3)
    train, validation = data.validation_split(sample.train_labels, fraction=0.2, seed=3)
    assert torch.equal(held.train_images, sample.train_images[train])
    assert torch.equal(held.train_labels, sample.train_labels[train])
    assert torch.equal(held.test_images, sample.train_images[validation])
    assert torch.equal(held.test_labels, sample.train_labels[validation])
    assert "held-out" in held.name and held.fingerprint != sample.fingerprint
    assert (held.epochs, held.batch_size) == (sample.epochs, sample.batch_size)


# Loaders


def in_batches(**options):
    return BatchTransform(**PLAIN, **options)


def one_by_one(**options):
    return albumentations_pipeline(**PLAIN, size=(12, 12), cutout=4, **options)


@pytest.fixture(params=[in_batches, one_by_one])
def transform(request):
    return request.param


def numbered(count):
    """Images whose every pixel is the image's number, and the numbers as labels."""
    labels = torch.arange(count)
    return labels.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 12, 12), labels


def repeated(count, side=12):
    """The same picture over and over: only the draws tell its copies apart."""
    codes = torch.arange(3 * side * side).fmod(251).to(torch.uint8).view(1, 3, side, side)
    return codes.repeat(count, 1, 1, 1), torch.arange(count)


def epoch(loader, number):
    """All of an epoch: images, labels."""
    loader.set_epoch(number)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_every_image_once_with_its_label_and_a_short_last_batch(transform):
    loader = data.make_loader(
        *numbered(23), transform(augment=False), batch_size=5, shuffle=True, workers=0
    )
    assert len(loader) == 5 and len(loader.dataset) == 23
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.float32 and images.shape == (23, 3, 12, 12)
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(23)) != labels.tolist()
    numbers = (images * 255).round()
    assert (numbers == labels.view(-1, 1, 1, 1)).all()


def test_without_shuffling_the_order_is_kept(transform):
    loader = data.make_loader(*numbered(23), transform(augment=False), batch_size=5, workers=0)
    assert epoch(loader, 3)[1].tolist() == list(range(23))


def test_epoch_depends_on_seed_and_number_only(transform):
    settings = {"batch_size": 8, "shuffle": True, "workers": 0}
    first = data.make_loader(*repeated(20), transform(), seed=5, **settings)
    epochs = [epoch(first, number) for number in range(4)]
    torch.manual_seed(99)
    np.random.seed(99)
    second = data.make_loader(*repeated(20), transform(), seed=5, **settings)
    images, labels = epoch(second, 3)
    assert torch.equal(images, epochs[3][0]) and torch.equal(labels, epochs[3][1])
    other = epoch(data.make_loader(*repeated(20), transform(), seed=6, **settings), 3)
    for images, labels in [*epochs[:3], other]:
        assert not torch.equal(images, epochs[3][0]), "the same draws"
        assert not torch.equal(labels, epochs[3][1]), "the same order"


def test_epoch_cut_off_leaves_no_trace(transform):
    """A run that broke off in mid-epoch sees that epoch again as it was."""
    settings = {"batch_size": 4, "shuffle": True, "workers": 0}
    loader = data.make_loader(*repeated(20), transform(), **settings)
    whole = epoch(loader, 1)
    loader.set_epoch(1)
    next(iter(loader))
    again = epoch(loader, 1)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_worker_processes_draw_apart_and_are_seeded():
    """Albumentations by itself repeats its draws in each worker and in each epoch."""
    def make(seed):
        return data.make_loader(
            *repeated(32, side=32), albumentations_pipeline(**PLAIN),
            batch_size=8, shuffle=True, seed=seed, workers=2,
        )

    loader = make(0)
    first, second = epoch(loader, 0), epoch(loader, 1)
    batches = first[0].split(8)  # worker 0 makes batches 0 and 2, worker 1 makes 1 and 3
    assert len({image.numpy().tobytes() for image in torch.cat([*first, *second][::2])}) >= 63
    assert not torch.equal(batches[0], batches[1])
    resumed = epoch(make(0), 1)
    assert torch.equal(resumed[0], second[0]) and torch.equal(resumed[1], second[1])
    assert not torch.equal(epoch(make(1), 1)[0], second[0])


def test_whole_batches_work_with_a_distributed_sampler():
    dataset = data.BatchDataset(*numbered(20), in_batches(augment=False))
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
        for images, labels in DataLoader(
            dataset, batch_size=4, sampler=sampler, collate_fn=lambda batch: batch
        ):
            assert ((images * 255).round() == labels.view(-1, 1, 1, 1)).all()
            seen += labels.tolist()
    assert sorted(seen) == list(range(20))
