"""What is drawn is what was given, readable, and nothing else is touched."""

import re
from dataclasses import replace
from functools import partial

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import cbook
from matplotlib.colors import to_rgba
from matplotlib.text import Annotation, Text
from torch import nn
from torch.nn import functional as F

from utils import plotting
from utils.models import CustomResNet, ResNet9
from utils.results import Results

CLASSES = ("cat", "dog", "an unusually long class name")
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
HISTORY = [
    {"epoch": 1, "train_loss": 1.5, "train_acc": 45.0, "test_loss": 1.25, "test_acc": 55.0},
    {"epoch": 2, "train_loss": 1.0, "train_acc": 65.0, "test_loss": 1.125, "test_acc": 62.5},
    {"epoch": 3, "train_loss": 0.5, "train_acc": 82.25, "test_loss": 0.75, "test_acc": 75.125},
]
PHASES = {
    "plain": {"input": 0.26, "forward": 5.04, "backward": 9.16, "optimizer": 0.04},
    "ours": {"input": 0.01, "forward": 2.04, "backward": 3.74, "optimizer": 0.01},
}


def counted(matrix, classes=()):
    """`Results` with the confusion matrix `matrix`."""
    matrix = torch.as_tensor(matrix)
    pairs = torch.cartesian_prod(*[torch.arange(len(matrix))] * 2)
    labels, predictions = pairs.repeat_interleave(matrix.flatten(), dim=0).T
    classes = classes or tuple(map(str, range(len(matrix))))
    return Results(5.0 * F.one_hot(predictions, len(matrix)), labels, classes)


RESULTS = counted([[90, 8, 2], [30, 70, 0], [1, 0, 199]], CLASSES)
NETWORK, RESNET9 = CustomResNet(), ResNet9()


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        plotting.use_style()
        yield
    plt.close("all")


def pictures(number, height=4, width=6):
    """Random pictures that are not square, so that a transposed one cannot pass."""
    generator = torch.Generator().manual_seed(0)
    shape = (number, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def shown(axes):
    """The one picture in each of the axes, (N, 3, H, W)."""
    arrays = [np.asarray(ax.images[0].get_array()) for ax in np.ravel(axes)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def texts(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


def named(ax):
    """What the legend says, line by line."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def extents(ax, found):
    """The texts' boxes in pixels, after the layout, without the lines of annotations."""
    ax.figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in found if text.get_text()]


def overlap(boxes):
    # Boxes that merely touch do not count.
    return any(a.padded(-1).overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


OWN = pd.DataFrame(HISTORY)
RUNGS = pd.DataFrame({
    "rung": ["plain", "a", "b"], "on": ["", "1", "1"], "kept": ["yes", "no", "yes"],
    "accuracies": [[50, 52], [63, 62], [64, 65]], "mean": [51, 62.5, 64.5],
    "gain": ["–", "+11.50 ± 1.00", "+13.50 ± 1.00"],
})
RATES = {"raw_losses": [2.0, 1.5, 8.0], "suggestion": 5e-3, "min_lr": 1e-3, "max_lr": 2e-2}

# Each function once, with good arguments: for the rules that hold for all of them.
SINGLE = [
    partial(plotting.lr_finder_curve, [1e-3, 1e-2, 1e-1], [2.0, 1.0, 9.0], **RATES),
    partial(plotting.lr_schedule, [0.1, 0.5, 0.1], steps_per_epoch=2),
    partial(plotting.loss_curves, HISTORY),
    partial(plotting.accuracy_curves, HISTORY, claimed={"test": 70}),
    partial(plotting.accuracy_band, [HISTORY, HISTORY]),
    partial(plotting.compare_curves, {"own": OWN}, {"own": OWN[:2]}),
    partial(plotting.ladder, RUNGS),
    partial(plotting.confusion_matrix, RESULTS),
    partial(plotting.per_class_accuracy, RESULTS),
    partial(plotting.calibration, RESULTS),
    partial(plotting.time_by_phase, PHASES),
    partial(plotting.network, NETWORK),
]
GRIDS = {
    partial(plotting.image_grid, pictures(6), "abcdef", columns=3): (2, 3),
    partial(plotting.sample_grid, pictures(6), LABELS, CLASSES, per_class=2): (3, 2),
    partial(plotting.augmentation_grid, pictures(2), pictures(6).unflatten(0, (2, 3))): (2, 4),
    partial(plotting.misclassified_grid, RESULTS, pictures(400), count=6): (2, 5),
}


@pytest.mark.parametrize("draw", SINGLE, ids=lambda draw: draw.func.__name__)
def test_draws_into_given_axes_and_opens_no_figure(draw):
    figure, ax = plt.subplots()
    assert draw(ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("draw", GRIDS, ids=lambda draw: draw.func.__name__)
def test_grid_has_as_many_rows_and_columns(draw):
    assert draw().shape == GRIDS[draw]


@pytest.mark.parametrize("draw", [*SINGLE, *GRIDS], ids=lambda draw: draw.func.__name__)
def test_opens_one_figure_and_leaves_global_state_alone(draw, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("plt.show() was called"))
    settings, seed = plt.rcParams.copy(), torch.get_rng_state()
    draw()
    assert len(plt.get_fignums()) == 1
    assert plt.rcParams == settings
    assert torch.equal(torch.get_rng_state(), seed)


def test_lines_differ_in_colour_line_style_and_marker():
    assert [len({style[key] for style in plotting.LINES.values()})
            for key in ("color", "linestyle", "marker")] == [3, 3, 3]


def test_pictures_in_files_have_two_pixels_where_the_size_asks_for_one(tmp_path):
    plt.figure(figsize=(2, 1)).savefig(tmp_path / "figure.png")
    assert plt.imread(tmp_path / "figure.png").shape == (200, 400, 4)


# Grids of pictures


@pytest.mark.parametrize("images", [pictures(5), pictures(5) / 255])
def test_image_grid_shows_pictures_in_order_and_upright(images):
    axes = plotting.image_grid(images, ["a", "b", "c", "d", "e"], columns=3)
    assert torch.equal(shown(axes.flat[:5]), images)
    assert [[ax.get_title() for ax in row] for row in axes] == [["a", "b", "c"], ["d", "e", ""]]
    assert axes[0, 0].get_ylim() == (3.5, -0.5)


def test_sample_grid_rows_hold_different_pictures_of_their_class():
    images = pictures(6)
    axes = plotting.sample_grid(images, LABELS, CLASSES, per_class=3)
    assert tuple(ax.get_ylabel() for ax in axes[:, 0]) == CLASSES
    found = [
        {i for ax in row if ax.images for i in range(6) if torch.equal(shown(ax)[0], images[i])}
        for row in axes
    ]
    assert found[0] < {0, 1, 2, 3} and len(found[0]) == 3
    assert found[1:] == [{4, 5}, set()]


def test_sample_grid_shows_the_same_pictures_each_time():
    images, labels = pictures(40), torch.zeros(40, dtype=torch.int64)
    first = shown(plotting.sample_grid(images, labels, ["a"]))
    torch.rand(1)
    assert torch.equal(shown(plotting.sample_grid(images, labels, ["a"])), first)


def test_augmentation_grid_puts_the_original_first_and_frames_it():
    originals, augmented = pictures(2), pictures(6, 8, 9).unflatten(0, (2, 3)) / 255
    axes = plotting.augmentation_grid(originals, augmented)
    assert torch.equal(shown(axes[:, 0]), originals)
    assert torch.equal(shown(axes[:, 1:]), augmented.flatten(0, 1))
    assert [ax.get_title() for ax in axes[0]] == ["original", "draw 1", "draw 2", "draw 3"]
    framed = [[ax.spines["left"].get_visible() for ax in row] for row in axes]
    assert framed == [[True, False, False, False]] * 2


def test_misclassified_grid_names_truth_prediction_and_confidence_of_wrong_pictures_only():
    logits = torch.tensor([[0.0, 3, 0], [9, 0, 0], [0.5, 0, 0], [0, 1, 0]])
    results, images = Results(logits, torch.tensor([0, 0, 2, 1]), CLASSES), pictures(4)
    axes = plotting.misclassified_grid(results, images)
    titles = [ax.get_title() for ax in axes.flat]
    assert titles == ["cat 5 %\n→ dog 91 %", "an unusually long class name 27 %\n→ cat 45 %"]
    assert torch.equal(shown(axes), images[[0, 2]])


def test_misclassified_grid_titles_of_long_names_do_not_overlap():
    results = counted([[0, 0, 0], [0, 0, 0], [3, 3, 0]], CLASSES)
    axes = plotting.misclassified_grid(results, pictures(6))
    boxes = extents(axes[0, 0], [ax.title for ax in axes.flat])
    assert not overlap(boxes + [ax.get_window_extent() for ax in axes.flat])


# Maps over pictures


def inferno(value):
    return 255 * np.array(plt.get_cmap("inferno")(value)[:3])


def test_heat_enlarges_bilinearly_and_is_as_opaque_as_the_map_is_large():
    images = pictures(1, height=2, width=4)
    over = plotting.heat(images, torch.tensor([[[0.0, 3.0]]]), opacity=0.5)
    assert over.dtype == torch.uint8
    for column, value in enumerate([0.0, 0.25, 0.75, 1.0]):
        before = images[0, :, :, column].T.double().numpy()
        expected = before + 0.5 * value * (inferno(value) - before)
        assert over[0, :, :, column].T.tolist() == expected.round().tolist()


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(-9, 9))
def test_heat_scales_each_map_to_its_own_maximum(seed, opacity, exponent):
    maps = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    larger = maps * torch.tensor([1.0, 2.0**exponent])[:, None, None]
    first, second = (plotting.heat(pictures(2), each, opacity=opacity) for each in (maps, larger))
    assert torch.equal(first, second)


@pytest.mark.parametrize("maps, opacity", [(torch.zeros(3, 2, 2), 1), (torch.ones(3, 2, 2), 0)])
def test_heat_of_nothing_leaves_the_pictures_as_they_are(maps, opacity):
    assert torch.equal(plotting.heat(pictures(3), maps, opacity=opacity), pictures(3))


def test_heat_at_full_opacity_is_the_colour_alone_and_leaves_its_arguments_alone():
    images, maps = pictures(2), torch.full((2, 40, 40), 7.0)
    over = plotting.heat(images, maps, opacity=1)
    colour = torch.from_numpy(inferno(1.0).round())[:, None, None]
    assert torch.equal(over, colour.byte().expand_as(over))
    assert torch.equal(images, pictures(2)) and (maps == 7).all()


# Learning rates


def test_lr_finder_curve_draws_the_raw_losses_behind_and_the_marks_named_above():
    lrs, losses = [1e-3, 1e-2, 1e-1], [2.0, 1.0, 1.5]
    ax = plotting.lr_finder_curve(lrs, losses, **RATES)
    curves = [line.get_xydata().T.tolist() for line in ax.lines[:2]]
    assert curves == [[lrs, RATES["raw_losses"]], [lrs, losses]]
    assert [mark.get_xdata()[0] for mark in ax.lines[2:]] == [1e-3, 5e-3, 2e-2]
    assert named(ax) == ["raw", "smoothed", "min 0.001", "suggestion 0.005", "max 0.02"]
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.bbox.y1


def test_lr_finder_curve_cuts_the_divergence_off():
    rates = RATES | {"raw_losses": [2.5, 0.5, 1.0, 2000.0]}
    ax = plotting.lr_finder_curve([1e-3, 1e-2, 1e-1, 1.0], [2.0, 1.0, 1.5, 900.0], **rates)
    assert ax.get_ylim() == pytest.approx((0.45, 2.3))


def test_lr_schedule_counts_epochs_and_names_start_peak_and_end():
    lrs = [0.1, 0.3, 0.5, 0.4, 0.3, 0.2]
    ax = plotting.lr_schedule(lrs, steps_per_epoch=2)
    assert ax.lines[0].get_xydata().tolist() == [[k / 2, lr] for k, lr in enumerate(lrs)]
    assert ax.lines[1].get_xydata().tolist() == [[0, 0.1], [1, 0.5], [2.5, 0.2]]
    assert ax.get_title() == "start 0.1, peak 0.5 at epoch 1.0, end 0.2"


# Training curves


@pytest.mark.parametrize("draw, quantity, ends", [
    (plotting.loss_curves, "loss", ["train 0.500", "test 0.750"]),
    (plotting.accuracy_curves, "acc", ["train 82.25", "test 75.12"]),
])
def test_curves_show_the_history_and_its_last_values(draw, quantity, ends):
    ax = draw(HISTORY)
    for drawn, name in zip(ax.lines, ["train", "test"], strict=True):
        expected = [[row["epoch"], row[f"{name}_{quantity}"]] for row in HISTORY]
        assert drawn.get_xydata().tolist() == expected
    assert named(ax) == ends


def test_loss_curves_say_that_the_training_loss_is_of_smoothed_labels():
    ax = plotting.loss_curves(HISTORY, smoothed=True)
    assert named(ax) == ["train (smoothed) 0.500", "test 0.750"]


def test_curves_show_validation_where_there_is_some():
    ax = plotting.accuracy_curves([row | {"val_acc": row["test_acc"] + 1} for row in HISTORY])
    assert list(ax.lines[1].get_ydata()) == [56.0, 63.5, 76.125]
    assert named(ax) == ["train 82.25", "val 76.12", "test 75.12"]
    assert ax.lines[1].get_color() == plotting.LINES["val"]["color"]


def test_curves_show_one_whole_tick_for_a_single_epoch():
    ax = plotting.loss_curves(HISTORY[:1])
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_accuracy_curves_draw_claimed_values_as_thin_lines_in_the_colour_of_the_curve():
    ax = plotting.accuracy_curves(HISTORY, claimed={"train": 98.6, "test": 90})
    drawn = [(*line.get_ydata(), line.get_color()) for line in ax.lines[2:]]
    train, test = (line.get_color() for line in ax.lines[:2])
    assert drawn == [(98.6, 98.6, train), (90, 90, test)]
    assert named(ax)[2:] == ["claimed train 98.60", "claimed test 90.00"]


def test_accuracy_band_is_mean_and_range_of_the_runs():
    higher = [row | {"train_acc": row["train_acc"] + 2} for row in HISTORY]
    ax = plotting.accuracy_band([HISTORY, higher])
    assert list(ax.lines[0].get_ydata()) == [46.0, 66.0, 83.25]
    assert named(ax) == ["train 83.25 (82.25–84.25)", "test 75.12 (75.12–75.12)"]
    band = set(map(tuple, ax.collections[0].get_paths()[0].vertices))
    assert {(1.0, 45.0), (1.0, 47.0), (3.0, 82.25), (3.0, 84.25)} <= band
    assert "2 runs" in ax.get_ylabel()


def test_ladder_goes_down_and_tells_each_gain_and_on_which_rung():
    """From where the later rungs begin: the first one's mean is a number."""
    ax = plotting.ladder(RUNGS)
    assert ticks(ax.yaxis) == ["1  plain", "2  a", "3  b"]
    assert texts(ax) == ["51.00", "+11.50 ± 1.00 on 1", "+13.50 ± 1.00 on 1"]
    *dots, means, kept = ax.lines
    assert [list(line.get_xdata()) for line in dots] == [[50, 52], [63, 62], [64, 65]]
    assert list(means.get_xdata()) == [51, 62.5, 64.5] and list(means.get_ydata()) == [0, 1, 2]
    assert list(kept.get_xdata()) == [51, 64.5] and list(kept.get_ydata()) == [0, 2]
    assert ax.get_xlim()[0] == 61.5 and ax.yaxis_inverted()


def test_compare_curves_draws_sources_in_the_colour_of_their_recipe_and_runs_of_any_length():
    published = {"b": OWN[:1], "unknown": OWN}
    ax = plotting.compare_curves({"a": OWN[:2], "b": OWN}, published)
    first, second, *_ = plotting.COLOURS
    assert [(line.get_color(), line.get_xydata().T.tolist()) for line in ax.lines] == [
        (plotting.GREY, [[1, 2, 3], [55.0, 62.5, 75.125]]),
        (second, [[1, 2, 3], [55.0, 62.5, 75.125]]),
        (first, [[1, 2], [55.0, 62.5]]),
        (second, [[1], [55.0]]),
    ]
    assert named(ax) == ["unknown, source 75.12", "b 75.12", "a 62.50", "b, source 55.00"]
    assert ax.lines[3].get_linewidth() < ax.lines[1].get_linewidth()
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.bbox.y1


@pytest.mark.parametrize("last, bottom", [(93.4, 40), (68.8, 30), (10, 0)])
def test_compare_curves_begins_at_half_the_lowest_last_accuracy_in_tens(last, bottom):
    ax = plotting.compare_curves({"a": pd.DataFrame({"epoch": [1], "test_acc": [last]})})
    assert ax.get_ylim() == (bottom, 100)


def test_compare_curves_of_more_recipes_than_colours_begins_again():
    ax = plotting.compare_curves({str(i): OWN for i in range(7)})
    assert ax.lines[6].get_color() == ax.lines[0].get_color() == plotting.BLUE
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines[:6]}) == 6


# Results by class


def test_confusion_matrix_writes_every_count_in_its_cell():
    ax = plotting.confusion_matrix(RESULTS)
    counts = [[0] * 3 for _ in range(3)]
    for text in ax.texts:
        column, row = text.get_position()
        counts[row][column] = int(text.get_text())
    assert counts == RESULTS.confusion.tolist() and len(ax.texts) == 9
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == list(CLASSES)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert [text.get_text() for text in ax.texts if text.get_color() == "white"] == ["30"]


def test_confusion_matrix_colours_errors_by_their_share_and_leaves_the_diagonal_out():
    image = plotting.confusion_matrix(RESULTS).images[0]
    assert image.get_array().filled(-1).tolist() == [[-1, 8, 2], [30, -1, 0], [0.5, 0, -1]]
    assert image.get_clim() == (0, 30)


@pytest.mark.parametrize("right", [0, 5])
def test_confusion_matrix_without_any_error_can_be_drawn(right):
    ax = plotting.confusion_matrix(counted([[right, 0], [0, right]]))
    ax.figure.draw_without_rendering()
    assert sorted(texts(ax)) == ["0", "0", str(right), str(right)]


@pytest.mark.parametrize("number", [25, 100])
def test_confusion_matrix_of_many_classes_has_no_numbers_and_all_names(number):
    ax = plotting.confusion_matrix(counted(torch.eye(number, dtype=torch.int64)))
    assert not texts(ax)
    for axis in (ax.xaxis, ax.yaxis):
        assert not overlap(extents(ax, axis.get_ticklabels()))
    labels = extents(ax, [ax.xaxis.label, ax.yaxis.label, *ax.get_yticklabels()])
    assert min(box.x0 for box in labels) > 0 and min(box.y0 for box in labels) > 0


def test_confusion_matrix_numbers_fit_into_the_cells_of_20_classes():
    ax = plotting.confusion_matrix(counted(1000 * torch.eye(20, dtype=torch.int64)))
    assert not overlap(extents(ax, ax.texts))


def test_per_class_accuracy_sorts_the_classes_and_marks_their_mean():
    ax = plotting.per_class_accuracy(RESULTS)
    assert [bar.get_width() for bar in ax.patches] == [70.0, 90.0, 99.5]
    assert ticks(ax.yaxis) == ["dog", "cat", CLASSES[2]]
    assert texts(ax) == ["70.0 %", "90.0 %", "99.5 %", "mean 86.50 %"]
    assert list(ax.lines[0].get_xdata()) == [86.5, 86.5]
    assert ax.lines[0].get_zorder() < min(bar.get_zorder() for bar in ax.patches)


@given(st.text(st.sampled_from("a$\\^{}_"), max_size=9))
def test_no_text_of_the_users_is_taken_for_a_formula(text):
    drawn = plotting.as_text(text)
    assert not cbook.is_math_text(drawn)
    assert drawn.replace(r"\$", "$") == text  # what matplotlib makes of other texts


ODD_NAMES = ("$", "$$", "$\\frac$ Ⓐ")  # the letter is not in the first of the fonts there are


@pytest.mark.filterwarnings("error:Glyph")  # that no font has
@pytest.mark.parametrize("draw", [
    plotting.confusion_matrix, plotting.per_class_accuracy,
    lambda results: plotting.misclassified_grid(results, pictures(400)),
    lambda results: plotting.sample_grid(pictures(9), torch.arange(9) % 3, results.classes),
], ids=["confusion", "per class", "misclassified", "sample"])
@pytest.mark.parametrize("there", [True, False])
def test_odd_names_are_drawn_as_they_are_or_by_number(draw, there, monkeypatch):
    if not there:
        manager = plotting.font_manager.fontManager
        fonts = [font for font in manager.ttflist if font.name == "DejaVu Sans"]
        monkeypatch.setattr(manager, "ttflist", fonts)
    figure = np.ravel(draw(replace(RESULTS, classes=ODD_NAMES)))[0].figure
    figure.draw_without_rendering()
    drawn = {text.get_text() for text in figure.findobj(Text)}
    assert plotting.numbered(ODD_NAMES) == ([] if there else [f"#2 is {ODD_NAMES[2]}"])
    last = plotting.as_text(ODD_NAMES[2]) if there else "#2"
    assert any(last in text for text in drawn) and any(r"\$\$" in text for text in drawn)


def test_per_class_accuracy_writes_numbers_at_the_right_end_of_the_bars_and_none_cut_off():
    ax = plotting.per_class_accuracy(counted([[1, 24], [1, 1]]))
    short, half, _ = extents(ax, ax.texts)
    assert short.x0 > ax.patches[0].get_window_extent().x0  # of 4 %: it can't hold its number
    bar = ax.patches[1].get_window_extent()
    assert bar.x0 < half.x0 and 0 < bar.x1 - half.x1 < 10
    assert bar.y0 < half.y0 and half.y1 < bar.y1


def test_calibration_draws_accuracy_by_confidence_the_gap_and_the_share_of_each_bin():
    """20 of 0.62, wrong; 20 of 0.95 and 20 of 0.98, 40 of these right; and 19 that don't count."""
    confidences = torch.tensor([0.95, 0.95, 0.98, 0.62]).repeat(20)
    labels = torch.tensor([0, 0, 1, 1]).repeat(20)
    confidences = torch.cat([confidences, torch.full((19,), 0.72)])
    logits = torch.stack([confidences.log(), (1 - confidences).log()], dim=1)
    labels = torch.cat([labels, torch.zeros(19).long()])
    ax = plotting.calibration(Results(logits, labels, ("a", "b")))
    points = [[62, 0], [96, 200 / 3]]
    drawn = ax.lines[1].get_xydata()
    assert drawn[np.isfinite(drawn).all(axis=1)] == pytest.approx(np.array(points), rel=1e-5)
    gaps = [line for line in ax.collections[0].get_segments() if len(line) == 2]  # no small bin's
    assert np.array(gaps) == pytest.approx(np.array([[[x, x], [x, y]] for x, y in points]), 1e-5)
    bars = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in ax.patches}
    shares = {190 / 3: 2000 / 99, 70: 1900 / 99, 290 / 3: 6000 / 99}
    assert {x: y for x, y in bars.items() if y} == pytest.approx(shares)
    assert texts(ax) == ["20", "19", "60"]
    error = 35.68  # (20 · 62 + 60 · (96 - 200/3) + 19 · 28) / 99
    assert f"gap, on average {error} % (ECE)" in named(ax)


# Where the time goes


def test_time_by_phase_stacks_the_phases_and_writes_what_has_room():
    ax = plotting.time_by_phase(PHASES)
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    assert np.allclose(widths, [[0.26, 0.01], [5.04, 2.04], [9.16, 3.74], [0.04, 0.01]])
    assert [bar.get_x() for bar in ax.containers[2]] == pytest.approx([5.3, 2.05])
    assert texts(ax) == ["5.04", "2.04", "9.16", "3.74", "14.5 ms", "5.8 ms"]
    assert named(ax) == ["input", "forward", "backward", "optimizer"]
    assert ticks(ax.yaxis) == ["plain", "ours"] and ax.yaxis_inverted()


# The network


def columns(ax):
    """The texts of each box, from top to bottom."""
    written = [text for text in ax.texts if text.get_text()]
    places = sorted({text.get_position()[0] for text in written})
    return [[t.get_text() for t in written if t.get_position()[0] == x] for x in places]


def skips(ax):
    """(start, end) of the arrows around boxes."""
    arrows = [text for text in ax.texts if isinstance(text, Annotation)]
    return [(a.get_position()[0], a.xy[0]) for a in arrows if "connectionstyle" in a.arrowprops]


def boxes_of(ax):
    return list(ax.patches)


RESIDUAL = "conv 3×3, {0}\nBN, ReLU\nconv 3×3, {0}\nBN, ReLU"


def test_network_tells_names_shapes_operations_and_parameters():
    ax = plotting.network(NETWORK)
    assert columns(ax) == [
        ["input", "3×32×32", "parameters"],
        ["prep", "64×32×32", "conv 3×3, 64\nBN, ReLU", "1,856"],
        ["layer1\nconv", "128×16×16", "conv 3×3, 128\nmax-pool 2\nBN, ReLU", "73,984"],
        ["layer1\nresidual", "128×16×16", RESIDUAL.format(128), "295,424"],
        ["layer2", "256×8×8", "conv 3×3, 256\nmax-pool 2\nBN, ReLU", "295,424"],
        ["layer3\nconv", "512×4×4", "conv 3×3, 512\nmax-pool 2\nBN, ReLU", "1,180,672"],
        ["layer3\nresidual", "512×4×4", RESIDUAL.format(512), "4,720,640"],
        ["pool", "512×1×1", "max-pool 4", "0"],
        ["fc", "10", "linear 512→10", "5,130"],
    ]
    assert ax.get_title() == "CustomResNet: 6,573,130 parameters"


@pytest.mark.parametrize("model", [NETWORK, RESNET9], ids=["custom_resnet", "resnet9"])
def test_network_skips_go_around_the_residual_boxes(model):
    ax = plotting.network(model)
    assert skips(ax) == [(2.5, 3.5), (5.5, 6.5)]
    orange = to_rgba(plotting.ORANGE)
    assert [i for i, box in enumerate(boxes_of(ax)) if box.get_facecolor() == orange] == [3, 6]


def test_network_of_any_modules_and_size_of_images():
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(8 * 12 * 12, 10))
    ax = plotting.network(model, size=16)
    assert columns(ax)[1] == ["0", "8×12×12", "conv 5×5, 8", "608"]
    assert skips(ax) == []


def test_network_box_sizes_follow_the_square_roots_of_the_shapes():
    boxes = boxes_of(plotting.network(NETWORK))
    heights = [(boxes[0].get_height() / box.get_height()) ** 2 for box in boxes]
    assert heights == pytest.approx([1, 1, 2, 2, 4, 8, 8, 32, 32])
    assert boxes[5].get_width() / boxes[1].get_width() == pytest.approx(8**0.5)


@pytest.mark.parametrize("model", [NETWORK, RESNET9], ids=["custom_resnet", "resnet9"])
def test_network_texts_overlap_neither_each_other_nor_the_boxes(model):
    ax = plotting.network(model)
    written = extents(ax, [*ax.texts, ax.title])
    assert not overlap([*written, *(box.get_window_extent() for box in boxes_of(ax))])
    assert ax.figure.get_figwidth() < 9.2
    assert min(text.get_fontsize() for text in ax.texts if text.get_text()) >= 8


def test_network_leaves_the_model_alone():
    model = CustomResNet()
    model.layer1.eval()
    plotting.network(model)
    assert [part.training for part in model.children()] == [True, False, True, True, True, True]
    assert not any(weights.is_meta for weights in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_network_tells_operations_in_the_order_of_the_model():
    assert columns(plotting.network(RESNET9))[2][2] == "conv 3×3, 128\nBN, ReLU\nmax-pool 2"


@pytest.mark.parametrize("change, found", [(-1.5, "-1.50..-0.50"), (float("nan"), "nan..nan")])
def test_a_normalised_picture_is_refused(change, found):
    images = pictures(1).float().clamp(0, 1)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 1
    with pytest.raises(ValueError, match=rf"in 0\.\.1, got {re.escape(found)}: undo"):
        plotting.image_grid(images + change, ["a"])


def test_rounding_errors_of_an_undone_normalisation_are_cut_off():
    images = torch.tensor([-1e-4, 0.5, 1 + 1e-4]).view(1, 3, 1, 1)
    (ax,) = plotting.image_grid(images, ["a"]).flat
    assert ax.images[0].get_array().tolist() == [[[0, 0.5, 1]]]
