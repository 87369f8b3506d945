"""Tests of ``utils.plotting``: what is drawn is what was given, and nothing else is touched."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import Circle, FancyBboxPatch

from utils import plotting

CLASSES = ["cat", "dog", "an unusually long class name"]
MATRIX = torch.tensor([[90, 8, 2], [30, 70, 0], [1, 0, 199]])
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
HISTORY = [
    {"epoch": 1, "lr": 0.1, "train_loss": 1.5, "train_acc": 45.0, "test_loss": 1.25,
     "test_acc": 55.0, "images_per_s": 100.0, "seconds": 5.0},
    {"epoch": 2, "lr": 0.2, "train_loss": 1.0, "train_acc": 65.0, "test_loss": 1.125,
     "test_acc": 62.5, "images_per_s": 100.0, "seconds": 5.0},
    {"epoch": 3, "lr": 0.0, "train_loss": 0.5, "train_acc": 82.25, "test_loss": 0.75,
     "test_acc": 75.125, "images_per_s": 100.0, "seconds": 5.0},
]
BLOCKS = [
    {"name": "input", "operations": [], "shape": (3, 32, 32), "parameters": 0},
    {"name": "layer 1", "operations": ["conv 3×3, 128", "+ residual: 2 × (conv 3×3, BN, ReLU)"],
     "shape": (128, 16, 16), "parameters": 1234},
    {"name": "head", "operations": ["linear"], "shape": (10,), "parameters": 1000},
]


@pytest.fixture(autouse=True)
def no_open_figures():
    plt.close("all")
    yield
    plt.close("all")


def pictures(number: int, height: int = 4, width: int = 6) -> torch.Tensor:
    """Random pictures that are not square, so that a transposed one cannot pass."""
    generator = torch.Generator().manual_seed(0)
    shape = (number, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def shown(ax) -> torch.Tensor:
    """The one picture in the axes, as ``(3, H, W)``."""
    (image,) = ax.images
    return torch.from_numpy(np.asarray(image.get_array())).permute(2, 0, 1)


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def boxes(ax) -> list:
    """The drawn texts' boxes in pixels, after the layout."""
    ax.figure.canvas.draw()
    return [text.get_window_extent() for text in ax.texts if text.get_text()]


def overlap(extents: list) -> bool:
    # Boxes that merely touch do not count.
    return any(a.padded(-1).overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


# Each function once, with good arguments: for the rules that hold for all of them.
SINGLE = {
    "lr_finder_curve": lambda ax: plotting.lr_finder_curve(
        [1e-3, 1e-2, 1e-1], [2.0, 1.0, 9.0], suggestion=1e-2, min_lr=1e-3, max_lr=2e-2, ax=ax
    ),
    "lr_schedule": lambda ax: plotting.lr_schedule([0.1, 0.5, 0.1], steps_per_epoch=2, ax=ax),
    "loss_curves": lambda ax: plotting.loss_curves(HISTORY, ax=ax),
    "accuracy_curves": lambda ax: plotting.accuracy_curves(HISTORY, claimed={"test": 70}, ax=ax),
    "confusion_matrix": lambda ax: plotting.confusion_matrix(MATRIX, CLASSES, ax=ax),
    "per_class_accuracy": lambda ax: plotting.per_class_accuracy(MATRIX, CLASSES, ax=ax),
    "network": lambda ax: plotting.network(BLOCKS, ax=ax),
}
GRIDS = {
    "image_grid": ((2, 3), lambda axes: plotting.image_grid(pictures(6), columns=3, axes=axes)),
    "sample_grid": (
        (3, 2),
        lambda axes: plotting.sample_grid(pictures(6), LABELS, CLASSES, per_class=2, axes=axes),
    ),
    "augmentation_grid": (
        (2, 4),
        lambda axes: plotting.augmentation_grid(
            pictures(2), pictures(6).unflatten(0, (2, 3)), axes=axes
        ),
    ),
    "misclassified_grid": (
        (2, 3),
        lambda axes: plotting.misclassified_grid(
            pictures(6), LABELS, LABELS, torch.ones(6), CLASSES, columns=3, axes=axes
        ),
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_draws_into_given_axes_and_opens_no_figure(name):
    figure, ax = plt.subplots()
    assert SINGLE[name](ax) is ax
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", GRIDS)
def test_grid_draws_into_given_axes_and_opens_no_figure(name):
    shape, draw = GRIDS[name]
    figure, axes = plt.subplots(*shape)
    assert draw(axes).tolist() == axes.tolist()
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", GRIDS)
def test_grid_rejects_a_wrong_number_of_axes(name):
    (rows, columns), draw = GRIDS[name]
    _, axes = plt.subplots(1, 5)
    with pytest.raises(ValueError, match=f"5 axes for {rows} x {columns} places"):
        draw(axes)


@pytest.mark.parametrize("name", [*SINGLE, *GRIDS])
def test_opens_one_figure_and_leaves_global_state_alone(name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("plt.show() was called"))
    settings, seed = plt.rcParams.copy(), torch.get_rng_state()
    state = np.random.get_state()[1].copy()
    drawn = SINGLE[name](None) if name in SINGLE else GRIDS[name][1](None)
    np.ravel(drawn)[0].figure.canvas.draw()
    assert len(plt.get_fignums()) == 1
    assert plt.rcParams == settings
    assert torch.equal(torch.get_rng_state(), seed)
    assert np.array_equal(np.random.get_state()[1], state)


def test_use_style_sets_different_colours_and_line_styles():
    with plt.rc_context():
        plotting.use_style()
        cycle = plt.rcParams["axes.prop_cycle"].by_key()
        assert len(set(cycle["color"])) == len(set(map(str, cycle["linestyle"]))) == 6
        assert plt.rcParams["figure.constrained_layout.use"] is True


# Grids of pictures


def test_image_grid_shows_pictures_in_order_and_upright():
    images = pictures(5)
    axes = plotting.image_grid(images, ["a", "b", "c", "d", "e"], columns=3)
    assert axes.shape == (2, 3)
    assert torch.equal(torch.stack([shown(ax) for ax in axes.flat[:5]]), images)
    assert [ax.get_title() for ax in axes.flat] == ["a", "b", "c", "d", "e", ""]
    assert not axes[1, 2].axison
    assert axes[0, 0].get_ylim() == (3.5, -0.5)


def test_image_grid_shows_floats_unchanged():
    images = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shown(plotting.image_grid(images)[0, 0]), images[0])


@pytest.mark.parametrize("number, shape", [(1, (1, 1)), (10, (1, 10)), (11, (2, 10))])
def test_image_grid_has_as_many_axes_as_needed(number, shape):
    assert plotting.image_grid(pictures(number)).shape == shape


@pytest.mark.parametrize("images, message", [
    (torch.zeros(3, 4, 6), r"images must be \(N, 3, H, W\), got \(3, 4, 6\)"),
    (torch.zeros(2, 4, 6, 3), r"images must be \(N, 3, H, W\), got \(2, 4, 6, 3\)"),
    (torch.zeros(0, 3, 4, 6), "there are no images"),
    (torch.full((1, 3, 4, 6), -1.5), r"in 0\.\.1, got -1\.50\.\.-1\.50: undo the normalisation"),
    (torch.full((1, 3, 4, 6), 255.0), r"in 0\.\.1, got 255\.00\.\.255\.00"),
    (torch.full((1, 3, 4, 6), float("nan")), r"in 0\.\.1, got nan\.\.nan"),
    (torch.zeros(1, 3, 4, 6, dtype=torch.int64), "must be uint8 or float, got torch.int64"),
])
def test_image_grid_rejects_what_is_no_picture(images, message):
    with pytest.raises(ValueError, match=message) as raised:
        plotting.image_grid(images)
    assert "\n" not in str(raised.value)
    assert plt.get_fignums() == []


def test_image_grid_rejects_a_wrong_number_of_titles():
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        plotting.image_grid(pictures(2), ["a"])


def test_sample_grid_rows_hold_pictures_of_their_class_only():
    images = pictures(6)
    axes = plotting.sample_grid(images, LABELS, CLASSES, per_class=3)
    assert axes.shape == (3, 3)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == CLASSES
    for row, (members, number) in enumerate([(range(4), 3), (range(4, 6), 2), ([], 0)]):
        places = [ax for ax in axes[row] if ax.images]
        found = {
            index for ax in places for index in members if torch.equal(shown(ax), images[index])
        }
        assert len(places) == len(found) == number


def test_sample_grid_depends_on_the_seed_alone():
    images, labels = pictures(40), torch.zeros(40, dtype=torch.int64)

    def draw(seed):
        axes = plotting.sample_grid(images, labels, ["a"], seed=seed)
        return torch.stack([shown(ax) for ax in axes.flat])

    first = draw(0)
    torch.rand(1)
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


@pytest.mark.parametrize("labels, message", [
    (torch.tensor([0, 1]), r"labels must be \(6,\), got \(2,\)"),
    (torch.tensor([0, 1, 2, 3, 0, 0]), r"labels must lie in 0\.\.2, got 0\.\.3"),
    (torch.tensor([0, 1, 2, -1, 0, 0]), r"labels must lie in 0\.\.2, got -1\.\.2"),
])
def test_sample_grid_rejects_labels_that_do_not_fit(labels, message):
    with pytest.raises(ValueError, match=message):
        plotting.sample_grid(pictures(6), labels, CLASSES)


def test_augmentation_grid_puts_the_original_first():
    originals, augmented = pictures(2), pictures(6, 8, 9).unflatten(0, (2, 3))
    axes = plotting.augmentation_grid(originals, augmented)
    assert axes.shape == (2, 4)
    assert torch.equal(torch.stack([shown(ax) for ax in axes[:, 0]]), originals)
    assert torch.equal(torch.stack([shown(ax) for ax in axes[:, 1:].flat]), augmented.flatten(0, 1))
    assert [ax.get_title() for ax in axes[0]] == ["original", "draw 1", "draw 2", "draw 3"]
    framed = [[ax.spines["left"].get_visible() for ax in row] for row in axes]
    assert framed == [[True, False, False, False]] * 2


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 2, 3, 4, 6)])
def test_augmentation_grid_rejects_draws_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\(R, C, 3, H, W\) with R = 2"):
        plotting.augmentation_grid(pictures(2), torch.zeros(shape))


def test_misclassified_grid_titles_name_truth_prediction_and_confidence():
    images = pictures(2)
    labels, predictions = torch.tensor([0, 2]), torch.tensor([1, 0])
    axes = plotting.misclassified_grid(
        images, labels, predictions, torch.tensor([0.974, 0.5]), CLASSES
    )
    assert [ax.get_title() for ax in axes.flat] == [
        "cat\n→ dog 97 %", "an unusually long class name\n→ cat 50 %",
    ]
    assert torch.equal(torch.stack([shown(ax) for ax in axes.flat]), images)


def test_misclassified_grid_titles_of_long_names_do_not_overlap():
    labels = torch.full((6,), 2)
    axes = plotting.misclassified_grid(
        pictures(6), labels, labels, torch.ones(6), CLASSES, columns=3
    )
    axes[0, 0].figure.canvas.draw()
    extents = [ax.title.get_window_extent() for ax in axes.flat]
    assert not overlap(extents + [ax.get_window_extent() for ax in axes.flat])


@pytest.mark.parametrize("change, message", [
    ({"predictions": torch.tensor([0, 3])}, r"predictions must lie in 0\.\.2, got 0\.\.3"),
    ({"confidences": torch.ones(3)}, r"confidences must be \(2,\), got \(3,\)"),
])
def test_misclassified_grid_rejects_what_does_not_fit(change, message):
    good = {"labels": torch.tensor([0, 2]), "predictions": torch.tensor([1, 0]),
            "confidences": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        plotting.misclassified_grid(pictures(2), **(good | change), classes=CLASSES)


# Learning rates


def test_lr_finder_curve_draws_the_data_and_the_marks():
    lrs, losses = [1e-3, 1e-2, 1e-1, 1.0], [2.0, 1.0, 1.5, 900.0]
    ax = plotting.lr_finder_curve(lrs, losses, suggestion=5e-3, min_lr=1e-3, max_lr=2e-2)
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_xdata().tolist() == lrs
    assert ax.lines[0].get_ydata().tolist() == losses
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [1e-3, 5e-3, 2e-2]
    assert texts(ax) == ["min 0.001", "suggestion 0.005", "max 0.02"]


def test_lr_finder_curve_cuts_the_divergence_off():
    ax = plotting.lr_finder_curve([1e-3, 1e-2, 1e-1, 1.0], [2.0, 1.0, 1.5, 900.0])
    low, high = ax.get_ylim()
    assert low < 1.0
    assert high == pytest.approx(2.3)


def test_lr_finder_curve_leaves_steps_out_that_are_not_finite():
    ax = plotting.lr_finder_curve([1e-3, 1e-2, 1e-1], [2.0, float("nan"), 1.0])
    assert ax.lines[0].get_xdata().tolist() == [1e-3, 1e-1]


@pytest.mark.parametrize("rates", [
    (1e-3, 1e-2, 1.1e-2), (1e-2, 1e-2, 1e-2), (9.0, 1e-7, 10.0), (10.0, 10.0, 10.0),
])
def test_lr_finder_labels_touch_neither_each_other_nor_the_curve_or_a_mark(rates):
    lrs = np.logspace(-7, 1, 50)
    losses = 1 + np.abs(np.linspace(-1, 1.5, 50))
    suggestion, low, high = rates
    ax = plotting.lr_finder_curve(lrs, losses, suggestion=suggestion, min_lr=low, max_lr=high)
    extents = boxes(ax)
    assert not overlap(extents)
    for drawn in ax.lines:
        path = drawn.get_path().transformed(drawn.get_transform())
        assert not any(path.intersects_bbox(extent, filled=False) for extent in extents)


@pytest.mark.parametrize("lrs, losses, message", [
    ([1e-3], [1.0, 2.0], "must be equally long"),
    ([1e-3], [float("inf")], "no loss is finite"),
])
def test_lr_finder_curve_rejects_what_cannot_be_drawn(lrs, losses, message):
    with pytest.raises(ValueError, match=message):
        plotting.lr_finder_curve(lrs, losses)


def test_lr_schedule_counts_epochs_and_names_start_peak_and_end():
    lrs = [0.1, 0.3, 0.5, 0.4, 0.3, 0.2]
    ax = plotting.lr_schedule(lrs, steps_per_epoch=2)
    assert ax.lines[0].get_xdata().tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert ax.lines[0].get_ydata().tolist() == lrs
    found = {text.get_text(): text.xy for text in ax.texts}
    assert found == {
        "start 0.1": (0, 0.1), "peak 0.5 at epoch 1.0": (1, 0.5), "end 0.2": (2.5, 0.2),
    }


@pytest.mark.parametrize("lrs, expected", [
    ([0.5, 0.1], ["start and peak 0.5", "end 0.1"]),
    ([0.1, 0.5], ["start 0.1", "end and peak 0.5"]),
    ([0.1], ["start and peak 0.1"]),
])
def test_lr_schedule_joins_labels_of_one_point(lrs, expected):
    assert texts(plotting.lr_schedule(lrs, steps_per_epoch=1)) == expected


def test_lr_schedule_rejects_an_empty_schedule():
    with pytest.raises(ValueError, match="non-empty"):
        plotting.lr_schedule([], steps_per_epoch=1)


# Training curves


@pytest.mark.parametrize("draw, quantity, ends", [
    (plotting.loss_curves, "loss", ["train 0.500", "test 0.750"]),
    (plotting.accuracy_curves, "acc", ["test 75.12", "train 82.25"]),
])
def test_curves_show_the_history_and_its_last_values(draw, quantity, ends):
    ax = draw(HISTORY)
    for name in ("train", "test"):
        drawn = line(ax, name)
        assert list(drawn.get_xdata()) == [1, 2, 3]
        assert list(drawn.get_ydata()) == [row[f"{name}_{quantity}"] for row in HISTORY]
    assert texts(ax) == ends


@pytest.mark.parametrize("draw", [plotting.loss_curves, plotting.accuracy_curves])
def test_curves_show_a_marker_and_a_whole_tick_for_a_single_epoch(draw):
    ax = draw(HISTORY[:1])
    low, high = ax.get_xlim()
    assert [line.get_marker() for line in ax.lines] == ["o", "s"]
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_curves_differ_in_colour_line_style_and_marker():
    train, test = plotting.loss_curves(HISTORY).lines
    assert train.get_color() != test.get_color()
    assert train.get_linestyle() != test.get_linestyle()
    assert train.get_marker() != test.get_marker()


def test_accuracy_curves_draw_claimed_values_as_reference_lines():
    ax = plotting.accuracy_curves(HISTORY, claimed={"train": 98.6, "test": 93.07, "other": 90})
    references = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in references] == [[98.6] * 2, [93.07] * 2, [90] * 2]
    assert references[0].get_color() == line(ax, "train").get_color()
    assert references[1].get_color() == line(ax, "test").get_color()
    assert {"claimed train 98.60", "claimed test 93.07", "claimed other 90.00"} <= set(texts(ax))


def test_accuracy_labels_do_not_overlap_where_the_values_agree():
    last = HISTORY[-1] | {"train_acc": 93.1, "test_acc": 93.05}
    ax = plotting.accuracy_curves(
        [*HISTORY[:-1], last], claimed={"train": 93.08, "test": 93.07, "other": 93.09}
    )
    ax.figure.canvas.draw()
    # An annotation's own extent takes its leader line in: the letters alone count here.
    extents = [matplotlib.text.Text.get_window_extent(text) for text in ax.texts]
    assert not overlap(extents)
    # They stand in the order of the values.
    centres = [(extent.y0 + extent.y1) / 2 for extent in extents]
    assert centres == sorted(centres)
    assert [text.xy[1] for text in ax.texts] == [93.05, 93.07, 93.08, 93.09, 93.1]


def test_curves_leave_the_label_of_a_diverged_run_out():
    ax = plotting.loss_curves([*HISTORY[:-1], HISTORY[-1] | {"train_loss": float("nan")}])
    assert texts(ax) == ["test 0.750"]


@pytest.mark.parametrize("draw", [plotting.loss_curves, plotting.accuracy_curves])
def test_curves_reject_an_empty_history(draw):
    with pytest.raises(ValueError, match="no epochs"):
        draw([])


# Results by class


def test_accuracy_band_is_mean_and_range_of_the_runs():
    higher = [{**row, "train_acc": row["train_acc"] + 2, "test_acc": row["test_acc"] + 1}
              for row in HISTORY]
    ax = plotting.accuracy_band([HISTORY, higher])
    assert list(line(ax, "train").get_ydata()) == [46.0, 66.0, 83.25]
    assert list(line(ax, "test").get_ydata()) == [55.5, 63.0, 75.625]
    assert texts(ax) == ["test 75.62 (75.12–76.12)", "train 83.25 (82.25–84.25)"]
    train, test = (band.get_paths()[0].vertices for band in ax.collections)
    assert {(1.0, 45.0), (1.0, 47.0), (3.0, 82.25), (3.0, 84.25)} <= set(map(tuple, train))
    assert {(1.0, 55.0), (1.0, 56.0), (3.0, 75.125), (3.0, 76.125)} <= set(map(tuple, test))
    assert "2 runs" in ax.get_ylabel()


def test_accuracy_band_draws_into_the_given_axes():
    _, axes = plt.subplots(1, 2)
    assert plotting.accuracy_band([HISTORY], ax=axes[1]) is axes[1]
    assert not axes[0].lines


@pytest.mark.parametrize("histories", [[], [[]], [HISTORY, HISTORY[:2]]])
def test_accuracy_band_of_runs_that_do_not_fit(histories):
    with pytest.raises(ValueError):
        plotting.accuracy_band(histories)


def test_confusion_matrix_writes_every_count_in_its_cell():
    ax = plotting.confusion_matrix(MATRIX, CLASSES)
    cells = {(text.get_position()[::-1]): text.get_text() for text in ax.texts}
    assert cells == {(r, c): str(MATRIX[r, c].item()) for r in range(3) for c in range(3)}
    assert [label.get_text() for label in ax.get_yticklabels()] == CLASSES
    assert [label.get_text() for label in ax.get_xticklabels()] == CLASSES
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")


def test_confusion_matrix_colours_errors_by_their_share_and_leaves_the_diagonal_out():
    drawn = plotting.confusion_matrix(MATRIX, CLASSES).images[0].get_array()
    assert drawn.mask.tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert drawn.filled(-1).tolist() == [[-1, 8, 2], [30, -1, 0], [0.5, 0, -1]]


def test_confusion_matrix_text_is_white_on_dark_cells_only():
    ax = plotting.confusion_matrix(MATRIX, CLASSES)
    assert [text.get_text() for text in ax.texts if text.get_color() == "white"] == ["30"]


@pytest.mark.parametrize("matrix", [torch.zeros(2, 2), 5 * torch.eye(2), torch.ones(1, 1)])
def test_confusion_matrix_without_any_error_can_be_drawn(matrix):
    ax = plotting.confusion_matrix(matrix.long(), CLASSES[: len(matrix)])
    ax.figure.canvas.draw()
    assert len(ax.texts) == matrix.numel()


@pytest.mark.parametrize("draw", [plotting.confusion_matrix, plotting.per_class_accuracy])
@pytest.mark.parametrize("matrix, message", [
    (MATRIX[:2], r"\(2, 3\) matrix for 3 classes"),
    (MATRIX / 100, "must hold counts, got torch.float32"),
])
def test_matrix_that_does_not_fit_is_rejected(draw, matrix, message):
    with pytest.raises(ValueError, match=message):
        draw(matrix, CLASSES)


def test_per_class_accuracy_sorts_the_classes_and_marks_their_mean():
    ax = plotting.per_class_accuracy(MATRIX, CLASSES)
    assert [bar.get_width() for bar in ax.patches] == [70.0, 90.0, 99.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dog", "cat", CLASSES[2]]
    assert [text.strip() for text in texts(ax)] == ["70.0 %", "90.0 %", "99.5 %", "mean 86.50 %"]
    assert list(ax.lines[0].get_xdata()) == [86.5, 86.5]


def test_per_class_accuracy_leaves_classes_without_pictures_out():
    matrix = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 4]])
    ax = plotting.per_class_accuracy(matrix, CLASSES)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", CLASSES[2]]
    assert list(ax.lines[0].get_xdata()) == [75.0, 75.0]


def test_per_class_accuracy_rejects_an_empty_matrix():
    with pytest.raises(ValueError, match="counts no pictures"):
        plotting.per_class_accuracy(torch.zeros(3, 3, dtype=torch.int64), CLASSES)


# The network


def test_network_draws_names_shapes_operations_and_parameters():
    found = [text for text in texts(plotting.network(BLOCKS)) if text]
    assert sorted(found) == sorted([
        "input", "layer 1", "head", "3×32×32", "128×16×16", "10", "1,234", "1,000", "skip", "+",
        "conv 3×3, 128", "residual\n2 × (conv 3×3,\nBN, ReLU)", "linear",
        "grey: parameters, 2,234 in total",
    ])


def test_network_box_sizes_follow_the_square_roots_of_shape():
    drawn = [patch for patch in plotting.network(BLOCKS).patches
             if isinstance(patch, FancyBboxPatch)]
    main, residual = drawn[1:3]
    assert len(drawn) == 4
    assert (main.get_width(), main.get_height()) == (residual.get_width(), residual.get_height())
    assert (drawn[0].get_height() / main.get_height()) ** 2 == pytest.approx(2)
    assert (main.get_width() / drawn[3].get_width()) ** 2 == pytest.approx(12.8)


def test_network_skip_goes_over_the_residual_box_to_the_sum():
    ax = plotting.network(BLOCKS)
    main, residual = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)][1:3]
    (plus,) = [patch for patch in ax.patches if isinstance(patch, Circle)]
    (label,) = [text for text in ax.texts if text.get_text() == "skip"]
    assert main.get_x() + main.get_width() < residual.get_x()
    assert residual.get_x() + residual.get_width() < plus.center[0]
    assert label.get_position()[1] > residual.get_y() + residual.get_height()


def test_network_without_residual_blocks_has_no_skip():
    assert "skip" not in texts(plotting.network([BLOCKS[0], BLOCKS[2]]))


def test_network_texts_do_not_overlap():
    ax = plotting.network([BLOCKS[0], *[BLOCKS[1]] * 3, *[BLOCKS[2]] * 3])
    assert not overlap(boxes(ax))


def test_network_rejects_an_empty_list():
    with pytest.raises(ValueError, match="no blocks"):
        plotting.network([])


# Where the time goes

PHASES = {
    "plain": {"input": 0.5, "forward": 5.0, "backward": 10.0, "optimizer": 0.5},
    "ours": {"input": 0.25, "forward": 2.0, "backward": 4.0, "optimizer": 0.25},
}


def test_time_by_phase_stacks_the_phases():
    ax = plotting.time_by_phase(PHASES)
    bars = {bars.get_label(): [(b.get_x(), b.get_width()) for b in bars] for bars in ax.containers}
    assert bars["forward"] == [(0.5, 5.0), (0.25, 2.0)]
    assert bars["optimizer"] == [(15.5, 0.5), (6.25, 0.25)]
    assert {"16 ms", "6.5 ms"} <= set(texts(ax))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["plain", "ours"]
    assert ax.yaxis_inverted()


def test_time_by_phase_of_nothing():
    with pytest.raises(ValueError, match="at least one"):
        plotting.time_by_phase({})
