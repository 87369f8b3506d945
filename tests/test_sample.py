"""The drawn sample: its form, its determinism, and that it takes more than a linear model."""

import pytest
import torch

from utils.sample import BATCH_SIZE, CLASSES, EPOCHS, draw_sample


@pytest.fixture(scope="module")
def sample():
    return draw_sample()


def test_form(sample):
    assert len(set(CLASSES)) == 10
    for images, labels in (sample[:2], sample[2:]):
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, 32, 32)
        assert labels.dtype == torch.int64
        counts = labels.bincount(minlength=10)
        assert counts.shape == (10,) and (counts == len(labels) // 10).all()
        assert labels[:10].unique().numel() == 10, "labels are sorted"


def test_a_run_is_short(sample):
    train_images, _, test_images, _ = sample
    assert len(train_images) % BATCH_SIZE == 0
    # In training passes: a forward pass alone costs a third of one.
    assert EPOCHS * (len(train_images) + len(test_images) / 3) <= 7_000


def test_same_pictures_each_time(sample):
    for first, second in zip(sample, draw_sample(), strict=True):
        assert torch.equal(first, second)


def test_no_picture_twice(sample):
    pictures = torch.cat([sample[0], sample[2]]).flatten(1)
    assert len({row.numpy().tobytes() for row in pictures}) == len(pictures)


def test_first_picture_is_the_same_everywhere(sample):
    """Some of its values, kept here: another platform or numpy must draw them too."""
    middle = sample[0][0, :, 16, 14:18]
    assert middle.tolist() == [[21, 8, 33, 37], [70, 51, 60, 60], [147, 152, 154, 158]]
    corner = sample[0][0, :, 0, :4]
    assert corner.tolist() == [[239, 255, 242, 255], [206, 209, 220, 230], [227, 220, 234, 222]]


def test_linear_model_falls_short(sample):
    """Ridge regression on one-hot labels, solved in closed form: guessing would give 10 %."""
    train_images, train_labels, test_images, test_labels = sample
    mean = train_images.double().mean(0)
    train, test = ((images - mean).flatten(1) / 255 for images in (train_images, test_images))
    targets = torch.nn.functional.one_hot(train_labels, 10).double() - 0.1
    for penalty in (10.0, 100.0, 1000.0):
        kernel = train @ train.T + penalty * torch.eye(len(train), dtype=torch.float64)
        scores = test @ (train.T @ torch.linalg.solve(kernel, targets))
        assert (scores.argmax(1) == test_labels).double().mean() < 0.5
