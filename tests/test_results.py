"""What is counted from logits and labels, against numpy and sums by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from utils import InputError, files
from utils.results import Results, read_predictions, save_predictions


@st.composite
def some_results(draw):
    """Logits and labels of 1 to 60 images in 2 to 6 classes, drawn by a seed."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, classes = draw(st.integers(1, 60)), draw(st.integers(2, 6))
    logits = torch.from_numpy(generator.normal(0, 3, (count, classes)).astype(np.float32))
    labels = torch.from_numpy(generator.integers(0, classes, count))
    return Results(logits, labels, tuple(map(str, range(classes))))


@given(some_results())
def test_accuracies_loss_and_confusion_are_numpys(results):
    logits, labels = results.logits.double().numpy(), results.labels.numpy()
    right = logits.argmax(1) == labels
    assert results.accuracy == 100 * right.sum() / len(labels)
    matrix = np.zeros((logits.shape[1],) * 2)
    np.add.at(matrix, (labels, logits.argmax(1)), 1)
    assert results.confusion.tolist() == matrix.tolist()
    assert results.per_class == {
        str(label): pytest.approx(100 * right[labels == label].mean())
        for label in np.unique(labels)
    }
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert results.confidences.numpy() == pytest.approx(probabilities.max(1), rel=1e-5)
    own = probabilities[np.arange(len(labels)), labels]
    assert results.loss == pytest.approx(-np.log(own).mean(), rel=1e-4, abs=1e-6)


@given(some_results(), st.integers(1, 12))
def test_misclassified_are_spread_over_all_that_are_wrong(results, count):
    wrong = [i for i, label in enumerate(results.labels) if results.predictions[i] != label]
    places = [wrong.index(i) for i in results.misclassified(count).tolist()]  # only wrong ones
    assert len(places) == min(count, len(wrong))
    if len(places) > 1:
        assert (places[0], places[-1]) == (0, len(wrong) - 1)
        steps = np.diff(places)
        assert steps.min() >= 1 and steps.max() - steps.min() <= 1


@given(some_results(), st.integers(1, 20))
def test_most_confused_pairs_have_the_most_mistakes(results, count):
    mistakes = {}
    for label, predicted in zip(results.labels.tolist(), results.predictions.tolist(), strict=True):
        if label != predicted:
            pair = tuple(sorted((str(label), str(predicted))))
            mistakes[pair] = mistakes.get(pair, 0) + 1
    found = {pair: number for number, *pair in results.most_confused(count) for pair in [(*pair,)]}
    assert found.items() <= mistakes.items()
    assert sorted(found.values()) == sorted(mistakes.values())[-count:]


def test_captions_name_both_classes_and_their_probabilities():
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.03, 0.9, 0.07], [0.125, 0.75, 0.125]])
    results = Results(shares.log(), torch.tensor([0, 2, 0]), ("cat", "dog", "ship"))
    assert results.captions(torch.tensor([2, 1])) == [
        "cat 12 % → dog 75 %", "ship 7 % → dog 90 %"
    ]


def test_confusion_has_true_classes_in_rows_and_leaves_the_missing_out_of_the_shares():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    logits = torch.eye(4)[[0, 1, 1, 1, 2, 2]]
    results = Results(logits, labels, ("a", "b", "c", "d"))
    assert results.confusion.tolist() == [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert results.per_class == {"a": pytest.approx(100 / 3), "b": 50, "c": 100}
    assert results.most_confused() == [(2, "a", "b"), (1, "b", "c")]


def test_calibration_error_by_hand():
    """Confidences 0.62 twice, once right; 0.95, right; 0.98, wrong: three images in two bins."""
    confidences = torch.tensor([0.62, 0.62, 0.95, 0.98])
    logits = torch.stack([confidences.log(), (1 - confidences).log()], dim=1)
    assert [math.floor(15 * c) for c in confidences.tolist()] == [9, 9, 14, 14]
    expected = (2 * abs(0.62 - 0.5) + 2 * abs((0.95 + 0.98) / 2 - 0.5)) / 4
    results = Results(logits, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    assert results.calibration_error == pytest.approx(100 * expected, rel=1e-4)


@given(some_results())
def test_calibration_counts_the_images_of_each_bin_and_its_means(results):
    confidences = results.logits.softmax(1).amax(1).double().numpy()
    right = results.logits.argmax(1).numpy() == results.labels.numpy()
    expected = []
    for k in range(15):
        inside = (confidences > k / 15) & (confidences <= (k + 1) / 15)
        means = [100 * confidences[inside].mean(), 100 * right[inside].mean()] if any(inside) else (
            [math.nan] * 2
        )
        expected.append([inside.sum(), *means])
    found = [each.tolist() for each in results.calibration]
    assert np.allclose(np.transpose(found), expected, rtol=1e-12, equal_nan=True)


@given(some_results())
def test_calibration_error_is_torchmetrics_and_the_mean_gap_of_the_bins(results):
    counts, confidences, accuracies = (each.numpy() for each in results.calibration)
    gaps = np.nan_to_num(np.abs(accuracies - confidences))
    assert results.calibration_error == pytest.approx(np.average(gaps, weights=counts))
    assume(results.confidences.max() < 1)  # torchmetrics 1.x gives those a bin of their own
    how = {"num_classes": results.logits.shape[1], "n_bins": 15}
    library = multiclass_calibration_error(results.logits.softmax(1), results.labels, **how)
    assert results.calibration_error == pytest.approx(100 * library.item(), rel=1e-4, abs=1e-4)


def test_calibration_counts_entire_certainty_in_the_last_bin():
    """0.95 wrong and 1 right, in one bin: 97.5 % sure, 50 % right."""
    logits = torch.tensor([[math.log(0.95), math.log(0.05)], [1000, 0]])
    results = Results(logits, torch.tensor([1, 0]), ("a", "b"))
    assert results.calibration[0].tolist() == [0] * 14 + [2]
    assert results.calibration_error == pytest.approx(47.5)


def test_calibration_error_of_a_diverged_network_is_not_a_number():
    logits = torch.tensor([[math.nan, math.nan], [1, 0]])
    results = Results(logits, torch.tensor([0, 0]), ("a", "b"))
    assert math.isnan(results.calibration_error)


@given(some_results())
def test_mean_confidence_tells_right_from_wrong(results):
    confidences = results.logits.double().softmax(1).amax(1)
    for right in (True, False):
        own = [c for c, p, label in zip(confidences.tolist(), results.predictions, results.labels,
                                        strict=True) if (p == label) == right]
        expected = pytest.approx(100 * np.mean(own), rel=1e-5) if own else pytest.approx(
            math.nan, nan_ok=True
        )
        assert results.mean_confidence(right=right) == expected


def test_predictions_come_back_sorted_by_class(tmp_path):
    """Within a class as they were; to the digits that float16 has."""
    logits = torch.tensor([[0.1, 2.0], [3.0, -1.0], [0.0, 0.5]])
    save_predictions(
        Results(logits, torch.tensor([1, 0, 1]), ("cat", "dog")), tmp_path / "kept"
    )
    found = read_predictions(tmp_path / "kept")
    assert torch.equal(found.logits, logits[[1, 0, 2]].half().float())
    assert found.labels.tolist() == [0, 1, 1] and found.classes == ("cat", "dog")


@pytest.mark.parametrize("tensors, about", [
    ({"fc.weight": torch.zeros(2)}, {"classes": ["cat"]}),
    ({"logits": torch.zeros(1, 1), "labels": torch.zeros(1)}, {}),
])
def test_another_file_holds_no_predictions(tmp_path, tensors, about):
    files.save_tensors(tensors, tmp_path / "w", about)
    with pytest.raises(InputError, match="w holds no predictions; [^\n]*$"):
        read_predictions(tmp_path / "w")
