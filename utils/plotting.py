"""All pictures of the project.

A function draws into the axes it is given, or into a new figure, and returns the axes. None of
them calls ``plt.show()``. Pictures are tensors ``(N, 3, H, W)``, uint8 or float in 0..1, so a
normalised batch has to be brought back to 0..1 first.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Okabe & Ito's palette: its colours stay apart in all common kinds of colour blindness.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, GREY = "#56B4E9", "#D55E00", "#666666"

# Colour, line style and marker all differ, so that a grey print can be read too.
LINES = {
    "train": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "test": {"color": VERMILION, "linestyle": "--", "marker": "s"},
}


def use_style() -> None:
    """Set matplotlib's defaults for the whole process; call it once, before the first picture."""
    colours = [BLUE, VERMILION, GREEN, ORANGE, PINK, SKY]
    styles = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
    plt.rcParams.update({
        "figure.figsize": (6.0, 3.6),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 100,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=colours) + plt.cycler(linestyle=styles),
        "axes.axisbelow": True,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
    })


def image_grid(
    images: Tensor,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 10,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """Show pictures row by row.

    Args:
        images: ``(N, 3, H, W)``, uint8 or float in 0..1.
        titles: N strings, one above each picture.
        columns: pictures in a row; fewer where there are fewer pictures.
        axes: ``rows * columns`` axes to draw into.

    Returns:
        The axes, ``(rows, columns)``; those without a picture are switched off.

    Raises:
        ValueError: if there are no pictures, or a shape, range or count does not fit.
    """
    pixels = _pixels(images)
    if len(pixels) == 0:
        raise ValueError("there are no images to show")
    if titles is not None and len(titles) != len(pixels):
        raise ValueError(f"{len(titles)} titles for {len(pixels)} images")

    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    lines = [line for title in titles or [] for line in title.split("\n")]
    widest = max((len(line) for line in lines), default=0)
    deepest = max((title.count("\n") + 1 for title in titles or []), default=0)
    # A character of 9 points is about 0.08 inches wide, a line 0.16 inches high.
    picture = 0.7 if titles is None else 1.0
    cell = max(picture, 0.08 * widest), picture + 0.05 + 0.16 * deepest
    axes = _grid(axes, rows, columns, cell)

    for index, ax in enumerate(axes.flat):
        if index < len(pixels):
            _show(ax, pixels[index])
            if titles is not None:
                ax.set_title(titles[index], fontsize=9, pad=3)
        else:
            ax.set_axis_off()
    return axes


def sample_grid(
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    per_class: int = 8,
    seed: int = 0,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """Show a row of randomly drawn pictures for each class, its name at the left.

    Args:
        images: ``(N, 3, H, W)``, uint8 or float in 0..1.
        labels: ``(N,)`` int64, positions in ``classes``.
        classes: names of the C classes.
        per_class: pictures in a row; a class with fewer of them leaves places empty.
        seed: chooses the pictures; the global random state is left alone.
        axes: ``C * per_class`` axes to draw into.

    Returns:
        The axes, ``(C, per_class)``.

    Raises:
        ValueError: if a shape, range or count does not fit.
    """
    _check_images(images)
    _check_labels("labels", labels, len(images), len(classes))
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for index in range(len(classes)):
        members = torch.nonzero(labels.cpu() == index).flatten()
        chosen = members[torch.randperm(len(members), generator=generator)[:per_class]]
        drawn.append(_pixels(images[chosen]))

    names = 0.08 * max(len(name) for name in classes)
    axes = _grid(axes, len(classes), per_class, (0.7, 0.7), left=names)
    for row, name, pictures in zip(axes, classes, drawn, strict=True):
        for ax, pixels in zip(row, pictures, strict=False):
            _show(ax, pixels)
        for ax in row[len(pictures):]:
            _frame(ax)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return axes


def augmentation_grid(
    originals: Tensor, augmented: Tensor, *, axes: np.ndarray | None = None
) -> np.ndarray:
    """Show each picture beside several random draws of its augmentation.

    Args:
        originals: ``(R, 3, H, W)``, uint8 or float in 0..1.
        augmented: ``(R, C, 3, H, W)``, C draws for each original.
        axes: ``R * (C + 1)`` axes to draw into.

    Returns:
        The axes, ``(R, C + 1)``; the framed first column holds the originals.

    Raises:
        ValueError: if a shape, range or count does not fit.
    """
    if augmented.ndim != 5 or len(augmented) != len(originals):
        raise ValueError(
            f"augmented must be (R, C, 3, H, W) with R = {len(originals)}, "
            f"got {tuple(augmented.shape)}"
        )
    first = _pixels(originals)
    draws = [_pixels(row) for row in augmented]
    # The first column is wider than its picture: the rest of it sets the originals apart.
    ratios = [1.2] + [1.0] * augmented.shape[1]
    axes = _grid(axes, len(first), len(ratios), (0.85, 0.85), width_ratios=ratios)

    for row, original, drawn in zip(axes, first, draws, strict=True):
        _show(row[0], original)
        row[0].set_anchor("W")
        for spine in row[0].spines.values():
            spine.set(visible=True, color=BLUE, linewidth=2)
        for ax, pixels in zip(row[1:], drawn, strict=True):
            _show(ax, pixels)
    axes[0, 0].set_title("original", fontsize=9, pad=4, color=BLUE)
    for number, ax in enumerate(axes[0, 1:], start=1):
        ax.set_title(f"draw {number}", fontsize=9, pad=4)
    return axes


def lr_finder_curve(
    lrs: Sequence[float],
    losses: Sequence[float],
    *,
    suggestion: float | None = None,
    min_lr: float | None = None,
    max_lr: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the loss of a learning-rate range test and the rates chosen from it.

    The loss axis ends shortly above what the loss was before its minimum, so that the divergence
    at the right runs out of the picture.

    Args:
        lrs: learning rate of each step, all above 0.
        losses: loss of each step; steps that are not finite are left out.
        suggestion: where the loss falls fastest.
        min_lr: where the schedule will start.
        max_lr: where the schedule will peak.
        ax: axes to draw into.

    Raises:
        ValueError: if the lengths differ or no loss is finite.
    """
    lrs, losses = np.asarray(lrs, dtype=float), np.asarray(losses, dtype=float)
    if lrs.shape != losses.shape or lrs.ndim != 1:
        raise ValueError(f"lrs and losses must be equally long, got {lrs.shape}, {losses.shape}")
    finite = np.isfinite(losses)
    if not finite.any():
        raise ValueError("no loss is finite")
    lrs, losses = lrs[finite], losses[finite]

    ax = _single(ax, (6.0, 3.8))
    ax.plot(lrs, losses, color="black", linestyle="-", linewidth=1.6)
    ax.set(xscale="log", xlabel="learning rate (log scale)", ylabel="loss")
    ax.spines[["top", "right"]].set_visible(False)

    marks = [
        (min_lr, "min", GREEN, ":"),
        (suggestion, "suggestion", BLUE, "--"),
        (max_lr, "max", VERMILION, "-."),
    ]
    marks = sorted((mark for mark in marks if mark[0] is not None), key=lambda mark: mark[0])

    lowest = losses.min()
    before = losses[: losses.argmin() + 1].max()
    span = max(before - lowest, 0.1 * abs(lowest), 1e-6)
    top = before + 0.3 * span
    # The labels get a strip of their own below the curve, a line each. A mark begins at its
    # label and goes up, so the leftmost has the lowest label and no mark crosses another's.
    strip = 0.04 + 0.075 * len(marks)
    ax.set_ylim((lowest - 0.05 * span - strip * top) / (1 - strip), top)
    for index, (value, name, colour, style) in enumerate(marks):
        bottom = 0.02 + 0.075 * index
        ax.axvline(value, ymin=bottom, color=colour, linestyle=style, linewidth=1.6)
        ax.annotate(
            f"{name} {value:.3g}", (value, bottom), xycoords=ax.get_xaxis_transform(),
            xytext=(4, 0), textcoords="offset points", va="bottom", color=colour, fontsize=9,
            annotation_clip=False,
        )
    return ax


def lr_schedule(lrs: Sequence[float], *, steps_per_epoch: int, ax: Axes | None = None) -> Axes:
    """Plot a learning-rate schedule over epochs and name its start, peak and end.

    Args:
        lrs: learning rate of each optimizer step, from the first on.
        steps_per_epoch: steps in an epoch; step ``k`` is drawn at ``k / steps_per_epoch``.
        ax: axes to draw into.

    Raises:
        ValueError: if there are no rates.
    """
    lrs = np.asarray(lrs, dtype=float)
    if lrs.ndim != 1 or len(lrs) == 0:
        raise ValueError(f"lrs must be a non-empty sequence of numbers, got shape {lrs.shape}")
    epochs = np.arange(len(lrs)) / steps_per_epoch
    last, peak = len(lrs) - 1, int(lrs.argmax())

    ax = _single(ax, (6.0, 3.4))
    ax.plot(epochs, lrs, color=BLUE, linestyle="-")
    ax.set(xlabel="epoch", ylabel="learning rate")
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(y=0.16)
    ax.grid(axis="y")
    names = {0: "start"}
    names[last] = "end" if last else "start"
    names[peak] = f"{names[peak]} and peak" if peak in names else "peak"
    for step, name in names.items():
        text = f"{name} {lrs[step]:.3g}"
        if name == "peak":
            text += f" at epoch {epochs[step]:.1f}"
        share = step / max(last, 1)
        above = step == peak
        ax.plot(epochs[step], lrs[step], color=VERMILION, marker="o", linestyle="none")
        ax.annotate(
            text, (epochs[step], lrs[step]), xytext=(0, 6 if above else -6),
            textcoords="offset points", va="bottom" if above else "top", fontsize=9,
            ha="left" if share < 0.15 else "right" if share > 0.85 else "center",
        )
    return ax


def loss_curves(history: Sequence[Mapping[str, float]], *, ax: Axes | None = None) -> Axes:
    """Plot the training and test loss of each epoch, the last ones as numbers.

    Args:
        history: a row per epoch with ``epoch`` (from 1), ``train_loss`` and ``test_loss``.
        ax: axes to draw into.

    Raises:
        ValueError: if the history is empty.
    """
    ax, labels = _epoch_curves(history, "loss", "{:.3f}", ax)
    ax.set_ylabel("loss")
    _label_at_right(ax, labels)
    return ax


def accuracy_curves(
    history: Sequence[Mapping[str, float]],
    *,
    claimed: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the training and test accuracy of each epoch, the last ones as numbers.

    Args:
        history: a row per epoch with ``epoch`` (from 1), ``train_acc`` and ``test_acc`` (percent).
        claimed: accuracies (percent) to compare with, drawn as thin lines; the keys "train" and
            "test" take the colour of the curve.
        ax: axes to draw into.

    Raises:
        ValueError: if the history is empty.
    """
    ax, labels = _epoch_curves(history, "acc", "{:.2f}", ax)
    ax.set_ylabel("accuracy, %")
    for name, value in (claimed or {}).items():
        colour = LINES.get(name, {}).get("color", GREY)
        ax.axhline(value, color=colour, linestyle=":", linewidth=1)
        labels.append((ax.get_yaxis_transform(), 1.0, value, f"claimed {name} {value:.2f}", colour))
    _label_at_right(ax, labels)
    return ax


def accuracy_band(
    histories: Sequence[Sequence[Mapping[str, float]]], *, ax: Axes | None = None
) -> Axes:
    """Plot the mean accuracy of several runs by epoch, in a band from their lowest to highest.

    Args:
        histories: a history per run, as for ``accuracy_curves``, all of the same epochs.
        ax: axes to draw into.

    Raises:
        ValueError: if there are no runs, or their epochs differ or are none.
    """
    if len({tuple(row["epoch"] for row in history) for history in histories}) != 1:
        raise ValueError("the runs must have the same epochs")
    names = [f"{name}_acc" for name in LINES]
    # runs × epochs × (train, test)
    values = np.array([[[row[name] for name in names] for row in run] for run in histories])
    mean = [
        {"epoch": row["epoch"], **dict(zip(names, means, strict=True))}
        for row, means in zip(histories[0], values.mean(axis=0), strict=True)
    ]
    ax, labels = _epoch_curves(mean, "acc", "{:.2f}", ax)
    epochs = [row["epoch"] for row in mean]
    for index, style in enumerate(LINES.values()):
        low, high = values[..., index].min(axis=0), values[..., index].max(axis=0)
        ax.fill_between(epochs, low, high, color=style["color"], alpha=0.25, linewidth=0)
        place, x, y, text, colour = labels[index]
        labels[index] = place, x, y, f"{text} ({low[-1]:.2f}–{high[-1]:.2f})", colour
    ax.set_ylabel(f"accuracy, %: mean and range of {len(histories)} runs")
    _label_at_right(ax, labels)
    return ax


def confusion_matrix(matrix: Tensor, classes: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Draw a confusion matrix: the counts as numbers, the errors' share of their row as colour.

    The diagonal stays grey: its counts are so much larger that they would hide the errors.

    Args:
        matrix: ``(C, C)`` int64 counts, rows true, columns predicted.
        classes: names of the C classes.
        ax: axes to draw into; a colour bar takes a part of them.

    Raises:
        ValueError: if the shape does not fit the classes, or the matrix is not of integers.
    """
    counts = _counts(matrix, classes)
    number = len(classes)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    errors = np.ma.masked_array(shares, mask=np.eye(number, dtype=bool))

    side = min(3.0 + 0.42 * number, 12.0)
    ax = _single(ax, (side, 0.9 * side))
    # The square root lifts the many small shares off white.
    norm = PowerNorm(0.5, vmin=0, vmax=max(errors.max() or 0, 1e-6) if number > 1 else 1)
    colours = plt.get_cmap("Blues").with_extremes(bad="#E0E0E0")
    image = ax.imshow(errors, cmap=colours, norm=norm, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="share of the true class, %", shrink=0.7)

    points = ax.bbox.width * 72 / ax.figure.dpi / number
    digits = max(len(str(counts.max())), 2)
    size = min(9.0, points / (0.75 * digits))
    grounds = image.to_rgba(errors)
    for row, column in np.ndindex(*counts.shape):
        red, green, blue, _ = grounds[row, column]
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        ax.text(
            column, row, str(counts[row, column]), ha="center", va="center", fontsize=size,
            color="white" if dark else "black", fontweight="bold" if row == column else "normal",
        )

    size = 9 if number <= 20 else 7
    ax.set_xticks(range(number), classes, rotation=45, ha="right", rotation_mode="anchor",
                  fontsize=size)
    ax.set_yticks(range(number), classes, fontsize=size)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def per_class_accuracy(matrix: Tensor, classes: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Draw the accuracy of each class as a bar, the best on top, and their mean.

    Args:
        matrix: ``(C, C)`` int64 counts, rows true, columns predicted; a class without any
            pictures is left out.
        classes: names of the C classes.
        ax: axes to draw into.

    Raises:
        ValueError: if the shape does not fit the classes, or the matrix is not of integers or
            all zeros.
    """
    counts = _counts(matrix, classes)
    totals = counts.sum(axis=1)
    if not totals.any():
        raise ValueError("the matrix counts no pictures")
    present = np.flatnonzero(totals)
    accuracy = 100 * counts.diagonal()[present] / totals[present]
    order = accuracy.argsort(kind="stable")
    mean = accuracy.mean()

    ax = _single(ax, (5.0, 1.0 + 0.24 * len(present)))
    bars = ax.barh(range(len(present)), accuracy[order], color=SKY, height=0.75)
    # A white ground keeps the mean's line out of the numbers.
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    ax.bar_label(bars, fmt="%.1f %%", padding=3, fontsize=9, bbox=ground)
    ax.set_yticks(range(len(present)), [classes[present[index]] for index in order])
    ax.tick_params(axis="y", length=0)
    ax.axvline(mean, color=VERMILION, linestyle="--", linewidth=1.4)
    # The empty row below the bars is for the mean's label.
    ax.text(mean, -0.95, f" mean {mean:.2f} % ", color=VERMILION, fontsize=9, va="center",
            ha="right" if mean > 50 else "left")
    ax.set(xlim=(0, 100), ylim=(-1.4, len(present) - 0.5), xlabel="accuracy, %")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def time_by_phase(
    phases: Mapping[str, Mapping[str, float]], *, ax: Axes | None = None
) -> Axes:
    """Draw where the time of a training step goes, as one stacked bar for each way to train.

    Args:
        phases: name of the way to (phase to milliseconds an image), the same phases in each; the
            first is on top.
        ax: axes to draw into.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not phases:
        raise ValueError("phases must name at least one way to train")
    names = list(phases)
    ax = _single(ax, (6.4, 1.5 + 0.5 * len(names)))
    left = np.zeros(len(names))
    longest = max(sum(times.values()) for times in phases.values())
    for phase, colour in zip(phases[names[0]], (VERMILION, SKY, BLUE, ORANGE), strict=True):
        times = np.array([phases[name][phase] for name in names])
        bars = ax.barh(names, times, left=left, color=colour, height=0.6, label=phase)
        texts = [f"{t:.2g}" if t > 0.06 * longest else "" for t in times]
        dark = colour == BLUE
        ax.bar_label(bars, texts, label_type="center", fontsize=9,
                     color="white" if dark else "black")
        left += times
    for row, total in enumerate(left):
        ax.annotate(f"{total:.3g} ms", (total, row), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=9)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 1.14 * longest), xlabel="milliseconds an image")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return ax


def misclassified_grid(
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    confidences: Tensor,
    classes: Sequence[str],
    *,
    columns: int = 5,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """Show pictures above which stand the true class, the predicted one and its probability.

    Args:
        images: ``(N, 3, H, W)``, uint8 or float in 0..1.
        labels: ``(N,)`` int64, the true classes.
        predictions: ``(N,)`` int64, the predicted classes.
        confidences: ``(N,)`` float in 0..1, the probabilities of the predicted classes.
        classes: names of the C classes.
        columns: pictures in a row; fewer where there are fewer pictures.
        axes: ``rows * columns`` axes to draw into.

    Returns:
        The axes, ``(rows, columns)``.

    Raises:
        ValueError: if there are no pictures, or a shape, range or count does not fit.
    """
    _check_images(images)
    _check_labels("labels", labels, len(images), len(classes))
    _check_labels("predictions", predictions, len(images), len(classes))
    if confidences.shape != labels.shape:
        raise ValueError(f"confidences must be ({len(images)},), got {tuple(confidences.shape)}")
    titles = [
        f"{classes[label]}\n→ {classes[prediction]} {100 * confidence:.0f} %"
        for label, prediction, confidence in zip(
            labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True
        )
    ]
    return image_grid(images, titles, columns=columns, axes=axes)


def network(blocks: Sequence[Mapping], *, ax: Axes | None = None) -> Axes:
    """Draw a network as a row of boxes, the input at the left.

    A box is as high as its output's spatial size and as wide as its channels (both by square
    root). The output's shape stands on the arrow behind the box.

    Args:
        blocks: a mapping per block with ``name``; ``operations``, a list of strings;
            ``shape``, the output's ``(channels, height, width)`` or ``(features,)``; and
            ``parameters``, their number. An operation "+ residual: ..." comes last and is drawn
            as a box of its own with the skip connection above it. A block without operations
            can stand for the input.
        ax: axes to draw into; the texts keep their size, so they collide in axes much smaller
            than a new figure (11.5 by 4 inches for this project's network).

    Raises:
        ValueError: if there are no blocks.
    """
    if not blocks:
        raise ValueError("there are no blocks to draw")
    tallest = max(max(block["shape"][1:], default=1) for block in blocks)
    widest = max(block["shape"][0] for block in blocks)
    new = ax is None
    ax = _single(ax, (10.0, 4.0))

    # One unit is an inch. The signal runs along y = 0, so the boxes lie evenly about it.
    right, centre, behind, depth, parameters = 0.0, -math.inf, "", 1, []
    for block in blocks:
        shape = block["shape"]
        height = max(2.0 * math.sqrt(max(shape[1:], default=1) / tallest), 0.3)
        width = max(math.sqrt(shape[0] / widest), 0.14)
        own = [text for text in block["operations"] if not text.startswith("+")]
        residual = [text.lstrip("+ ") for text in block["operations"] if text.startswith("+")]
        boxes = [(own, GREEN if len(shape) == 1 else SKY if own else GREY)]
        boxes += [(residual, ORANGE)] if residual else []

        edges = []
        for operations, colour in boxes:
            # A line of text has at most 15 characters, about an inch.
            arrow = 0.35 if edges else 0.8 if behind else 0
            centre = max(right + arrow + width / 2, centre + 1.12)
            if behind:
                _arrow(ax, [(right, 0), (centre - width / 2, 0)], "" if edges else behind)
            ax.add_patch(FancyBboxPatch(
                (centre - width / 2, -height / 2), width, height, facecolor=colour, alpha=0.75,
                edgecolor="black", boxstyle="round,pad=0,rounding_size=0.04",
            ))
            parts = [part for text in operations for part in text.split(": ")]
            lines = [line for part in parts for line in textwrap.wrap(part, 15)]
            depth = max(depth, len(lines))
            ax.text(centre, -1.2, "\n".join(lines), ha="center", va="top", fontsize=8)
            edges += [centre - width / 2, centre + width / 2]
            right = edges[-1]
            behind = "×".join(str(size) for size in shape)

        if residual:
            fork, plus, top = (edges[1] + edges[2]) / 2, right + 0.35, height / 2 + 0.2
            _arrow(ax, [(right, 0), (plus - 0.1, 0)])
            _arrow(ax, [(fork, 0), (fork, top), (plus, top), (plus, 0.1)], "skip", colour=VERMILION)
            ax.add_patch(Circle((plus, 0), 0.1, facecolor="white", edgecolor="black"))
            ax.text(plus, 0, "+", ha="center", va="center_baseline", fontsize=10)
            right = plus + 0.1
        middle = (edges[0] + edges[-1]) / 2
        ax.text(middle, 1.4, block["name"], ha="center", fontsize=10, fontweight="bold")
        parameters.append((middle, block["parameters"]))

    _arrow(ax, [(right, 0), (right + 0.75, 0)], behind)
    floor = -1.3 - 0.135 * depth
    for middle, number in parameters:
        if number:
            ax.text(middle, floor, f"{number:,}", ha="center", va="top", fontsize=8, color=GREY)
    total = sum(number for _, number in parameters)
    ax.text(right + 0.75, floor - 0.22, f"grey: parameters, {total:,} in total", ha="right",
            va="top", fontsize=8, color=GREY)
    ax.set(xlim=(-0.4, right + 0.85), ylim=(floor - 0.45, 1.65), aspect="equal")
    ax.set_axis_off()
    if new:
        ax.figure.set_size_inches(right + 1.25, 2.1 - floor)
    return ax


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}")


def _check_labels(name: str, labels: Tensor, images: int, classes: int) -> None:
    if labels.shape != (images,):
        raise ValueError(f"{name} must be ({images},), got {tuple(labels.shape)}")
    if images and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"{name} must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}"
        )


def _pixels(images: Tensor) -> np.ndarray:
    """Turn ``(N, 3, H, W)`` into the ``(N, H, W, 3)`` array that matplotlib shows."""
    _check_images(images)
    images = images.detach().cpu()
    if images.is_floating_point():
        # Undoing a normalisation leaves rounding errors; anything larger is a mistake.
        if images.numel() and not -1e-3 <= images.min() <= images.max() <= 1 + 1e-3:
            raise ValueError(
                f"float images must lie in 0..1, got {images.min():.2f}..{images.max():.2f}: "
                "undo the normalisation first"
            )
        images = images.float().clamp(0, 1)
    elif images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 or float, got {images.dtype}")
    return images.permute(0, 2, 3, 1).numpy()


def _counts(matrix: Tensor, classes: Sequence[str]) -> np.ndarray:
    if matrix.shape != (len(classes), len(classes)):
        raise ValueError(f"{tuple(matrix.shape)} matrix for {len(classes)} classes")
    if matrix.is_floating_point():
        raise ValueError(f"the matrix must hold counts, got {matrix.dtype}")
    return matrix.detach().cpu().numpy()


def _single(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is None:
        _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def _grid(
    axes: np.ndarray | None,
    rows: int,
    columns: int,
    cell: tuple[float, float],
    *,
    left: float = 0.0,
    width_ratios: Sequence[float] | None = None,
) -> np.ndarray:
    """Return ``(rows, columns)`` axes: the caller's, or new ones of ``cell`` inches each.

    ``left`` is the room in inches for labels at the left of the rows.
    """
    if axes is not None:
        axes = np.asarray(axes)
        if axes.size != rows * columns:
            raise ValueError(f"{axes.size} axes for {rows} x {columns} places")
        return axes.reshape(rows, columns)
    width = left + cell[0] * sum(width_ratios or [1] * columns)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, layout="constrained", width_ratios=width_ratios,
        figsize=(max(width, 2.0), max(cell[1] * rows, 1.2)),
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    return axes


def _arrow(
    ax: Axes, points: Sequence[tuple[float, float]], text: str = "", *, colour: str = "black"
) -> None:
    """Draw an arrow along the level and upright lines between ``points``, ``text`` above it."""
    points = np.asarray(points)
    vertices, codes = [points[0]], [Path.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        # Each corner is rounded by 0.12 units.
        vertices += [corner + 0.12 * np.sign(before - corner), corner,
                     corner + 0.12 * np.sign(after - corner)]
        codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
    path = Path([*vertices, points[-1]], [*codes, Path.LINETO])
    ax.add_patch(FancyArrowPatch(
        path=path, arrowstyle="-|>", mutation_scale=9, facecolor=colour, edgecolor=colour
    ))
    middle, top = points[[0, -1], 0].mean(), points[:, 1].max()
    ax.text(middle, top + 0.06, text, ha="center", va="bottom", fontsize=8, color=colour)


def _frame(ax: Axes) -> None:
    # Not set_axis_off(): it would hide the label at the left of a row too.
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _show(ax: Axes, pixels: np.ndarray) -> None:
    ax.imshow(pixels, interpolation="nearest")
    _frame(ax)


def _epoch_curves(
    history: Sequence[Mapping[str, float]], quantity: str, number: str, ax: Axes | None
) -> tuple[Axes, list[tuple]]:
    """Plot ``train_<quantity>`` and ``test_<quantity>``; return the labels for the lines' ends."""
    if not history:
        raise ValueError("the history has no epochs")
    ax = _single(ax, (6.0, 3.6))
    epochs = [row["epoch"] for row in history]
    labels = []
    for name, style in LINES.items():
        values = [row[f"{name}_{quantity}"] for row in history]
        ax.plot(epochs, values, label=name, linewidth=1.6, markersize=4, **style)
        text = f"{name} {number.format(values[-1])}"
        labels.append((ax.transData, epochs[-1], values[-1], text, style["color"]))
    ax.set_xlabel("epoch")
    ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(axis="y")
    ax.spines[["top", "right"]].set_visible(False)
    return ax, labels


def _label_at_right(ax: Axes, labels: Sequence[tuple]) -> None:
    """Write labels ``(transform, x, y, text, colour)`` right of the axes, none over another."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, high)
    labels = sorted((label for label in labels if np.isfinite(label[2])), key=lambda x: x[2])
    heights = [(label[2] - low) / (high - low) for label in labels]
    gap = 14 / (ax.bbox.height * 72 / ax.figure.dpi)
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    # What was pushed out at the top comes back down, and takes along what is below it.
    ceiling = 1.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    for (transform, x, y, text, colour), height in zip(labels, heights, strict=True):
        ax.annotate(
            text, (x, y), xycoords=transform, xytext=(1.04, height), textcoords="axes fraction",
            va="center", color=colour, fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 2},
        )
