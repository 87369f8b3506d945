"""What a network makes of labelled images: predictions, and all that is counted from them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import InputError, files

BINS = 15  # of confidence, from 0 to 1


@dataclass(frozen=True, eq=False)
class Results:
    """Logits float (N, C) and labels int64 (N,) of N images, in their order, on the CPU.

    `classes`: the names of the C classes; without them nothing is told by class. Shares are in
    percent.
    """

    logits: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()

    @cached_property
    def predictions(self):
        """The likeliest class of each image, int64 (N,)."""
        return self.logits.argmax(1)

    @cached_property
    def confidences(self):
        """The probability of the predicted class, float (N,) in 0..1."""
        return self.logits.softmax(1).amax(1)

    @cached_property
    def right(self):
        """Which predictions are right, bool (N,)."""
        return self.predictions == self.labels

    @cached_property
    def loss(self):
        """The mean cross-entropy over all images."""
        return F.cross_entropy(self.logits, self.labels).item()

    @cached_property
    def accuracy(self):
        """The share of right predictions."""
        return 100 * self.right.sum().item() / len(self.labels)

    @cached_property
    def confusion(self):
        """Counts int64 (C, C): rows are true classes, columns predicted ones."""
        count = len(self.classes)
        pairs = count * self.labels + self.predictions
        return pairs.bincount(minlength=count**2).view(count, count)

    @cached_property
    def per_class(self):
        """The accuracy of each class that occurs, by its name."""
        rows = zip(self.classes, self.confusion.tolist(), strict=True)
        return {name: 100 * row[i] / sum(row) for i, (name, row) in enumerate(rows) if sum(row)}

    def mean_confidence(self, *, right):
        """The mean confidence of the right predictions or of the wrong ones, NaN without any."""
        return 100 * self.confidences[self.right == right].mean().item()

    @cached_property
    def calibration(self):
        """(counts, confidences, accuracies) of 15 equal bins of confidence, from 0 to 1.

        The number of images in each, int64 (15,), their mean confidence and their accuracy, both
        float64 (15,), NaN in an empty bin. An upper bound belongs to its bin, a lower one doesn't.
        """
        confidences = self.confidences.double()
        bins = torch.bucketize(confidences, torch.linspace(0, 1, BINS + 1).double()[1:-1])
        counts = bins.bincount(minlength=BINS)
        mean_confidences = 100 * bins.bincount(confidences, BINS) / counts
        accuracies = 100 * bins.bincount(self.right.double(), BINS) / counts
        return counts, mean_confidences, accuracies

    @cached_property
    def calibration_error(self):
        """The expected calibration error: how far confidence is off accuracy, a bin's mean.

        Source: Guo et al., "On calibration of modern neural networks" (2017).
        """
        counts, confidences, accuracies = self.calibration
        off = counts * (accuracies - confidences).abs()
        return off[counts > 0].sum().item() / len(self.labels)

    def misclassified(self, count=10):
        """Indices int64 of at most `count` wrong predictions, spread evenly over all of them."""
        wrong = (~self.right).nonzero().squeeze(1)
        return wrong[torch.linspace(0, len(wrong) - 1, min(count, len(wrong))).long()]

    def captions(self, indices, classes=None):
        """["cat 3 % → dog 97 %"]: true and predicted class of each, with their probabilities.

        `classes`: what to call them; None: their names.
        """
        names = classes or self.classes
        shares = 100 * self.logits[indices].softmax(1)
        rows = zip(self.labels[indices], self.predictions[indices], shares, strict=True)
        return [
            f"{names[true]} {share[true]:.0f} % → {names[predicted]} {share[predicted]:.0f} %"
            for true, predicted, share in rows
        ]

    def most_confused(self, count=3):
        """The pairs of classes with the most mistakes, either way: [(mistakes, name, name), …]."""
        errors = self.confusion.clone().fill_diagonal_(0)
        pairs = (errors + errors.T).triu()
        mistakes, places = pairs.flatten().topk(min(count, pairs.numel()))
        return [
            (number, *(self.classes[i] for i in divmod(place, len(self.classes))))
            for number, place in zip(mistakes.tolist(), places.tolist(), strict=True) if number
        ]


def save_predictions(results, path):
    """As safetensors, for `read_predictions`: classes, labels, and the logits in float16.

    Sorted by class, and within a class as they were: so a folder and a download of the same
    images come in one order.
    """
    order = results.labels.argsort(stable=True)
    tensors = {"logits": results.logits[order].half(), "labels": results.labels[order]}
    files.save_tensors(tensors, path, {"classes": results.classes})


def read_predictions(path):
    """`Results` of a file by `save_predictions`. Raises InputError where it is none."""
    tensors, about = files.read_tensors(path)
    try:
        return Results(tensors["logits"].float(), tensors["labels"], tuple(about["classes"]))
    except KeyError as error:
        raise InputError(f"{path} holds no predictions; name a predictions.safetensors") from error
