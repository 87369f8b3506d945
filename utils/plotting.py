"""All pictures of the project.

A function draws into the axes it is given, or into a new figure, and returns the axes; grids of
pictures are always new figures. None of them calls `plt.show()`. `images` are tensors (N, 3, H, W),
uint8 or float in 0..1, so a normalised batch has to be brought back to 0..1 first; ValueError says
so.
"""

import copy
import math
import os
import textwrap
from itertools import cycle, zip_longest

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib import font_manager
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.nn import functional as F

# Okabe & Ito's palette: its colours stay apart in all common kinds of colour blindness.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, GREY = "#56B4E9", "#D55E00", "#666666"

COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)  # one after the other, the darker ones first

# Colour, line style and marker all differ, so that a grey print can be read too.
LINES = {
    "train": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "val": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "test": {"color": VERMILION, "linestyle": "--", "marker": "s"},
}

# How `network` writes a layer.
OPERATIONS = {
    nn.Conv2d: "conv {0.kernel_size[0]}×{0.kernel_size[1]}, {0.out_channels}",
    nn.MaxPool2d: "max-pool {0.kernel_size}",
    nn.BatchNorm2d: "BN",
    nn.ReLU: "ReLU",
    nn.Linear: "linear {0.in_features}→{0.out_features}",
}


def use_style():
    """Sets matplotlib's defaults for the whole process; call it once, before the first picture.

    Files, and the pictures that a notebook stores, get two pixels where the size asks for one.
    """
    plt.rcParams.update({
        "figure.figsize": (6.0, 3.6), "figure.constrained_layout.use": True, "savefig.dpi": 200,
        "axes.prop_cycle": plt.cycler(
            color=COLOURS, linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]
        ),
        "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "image.interpolation": "nearest",
        "font.size": 9, "lines.linewidth": 1.6, "lines.markersize": 4,
    })
    if "inline" in plt.get_backend():  # a notebook, which does not heed savefig.dpi
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def _without_glyph(characters, path):
    """Those that a font has no picture of."""
    font = font_manager.get_font(path)
    return {character for character in characters if not font.get_char_index(ord(character))}


def _lacking(text):
    """The characters that no font has; fonts of the system help matplotlib's own from now on."""
    lacking = _without_glyph(text, font_manager.findfont("DejaVu Sans")) - {"\n"}
    for font in font_manager.fontManager.ttflist if lacking else ():
        if os.path.exists(font.fname) and not font.name.startswith("Last Resort"):  # of boxes
            family = plt.rcParams["font.family"]
            left = _without_glyph(lacking, font.fname)
            if left < lacking and font.name not in family:
                plt.rcParams["font.family"] = [*family, font.name]
            lacking = left
    return lacking


def as_text(text):
    """A text of the user's, to be drawn as it is: "$" begins no formula."""
    _lacking(text)
    return text.replace("$", r"\$")


def class_names(classes):
    """What classes are called in pictures: their names, or "#3" where no font can write one."""
    lacking = _lacking("".join(classes))
    return tuple(f"#{i}" if lacking & set(name) else name for i, name in enumerate(classes))


def numbered(classes):
    """What to write beside pictures in which `class_names` are numbers: ["#3 is …"]."""
    pairs = zip(class_names(classes), classes, strict=True)
    return [f"{number} is {name}" for number, name in pairs if number != name]


def image_grid(images, titles, *, columns=10):
    """Shows pictures row by row, each below its title. Returns the axes (rows, columns)."""
    pixels = _pixels(images)
    columns = min(columns, len(pixels))
    widest = max(len(line) for title in titles for line in title.split("\n"))
    lines = 1 + max(title.count("\n") for title in titles)
    # A character of 9 points is about 0.08 inches wide, a line 0.16 inches high.
    cell = max(1.0, 0.08 * widest), 1.05 + 0.16 * lines
    titles = [as_text(title) for title in titles]
    axes = _grid(math.ceil(len(pixels) / columns), columns, cell)
    for ax, picture, title in zip_longest(axes.flat, pixels, titles):
        _show(ax, picture)
        ax.set_title(title, fontsize=9, pad=3)
    return axes


def sample_grid(images, labels, classes, *, per_class=8):
    """Shows a row of randomly drawn pictures for each class, its name at the left.

    `labels`: int64 (N,), positions in `classes`, the names. A class of fewer than `per_class`
    pictures leaves places empty. They are always the same. Returns the axes (C, per_class).
    """
    names = class_names(classes)
    axes = _grid(len(names), per_class, (0.7, 0.7), left=0.08 * max(map(len, names)))
    generator = torch.Generator().manual_seed(0)
    for index, name in enumerate(names):
        members = (labels == index).nonzero().flatten()
        chosen = members[torch.randperm(len(members), generator=generator)[:per_class]]
        for ax, picture in zip_longest(axes[index], _pixels(images[chosen])):
            _show(ax, picture)
        axes[index, 0].set_ylabel(as_text(name), rotation=0, ha="right", va="center")
    return axes


def augmentation_grid(originals, augmented):
    """Shows each picture, framed, beside several random draws of its augmentation.

    `originals` (R, 3, H, W) and `augmented` (R, C, 3, H, W). Returns the axes (R, C + 1).
    """
    axes = _grid(len(augmented), augmented.shape[1] + 1, (0.85, 0.9))
    for row, original, draws in zip(axes, _pixels(originals), augmented, strict=True):
        for ax, picture in zip(row, [original, *_pixels(draws)], strict=True):
            _show(ax, picture)
        row[0].spines[:].set(visible=True, color=BLUE, linewidth=2)
    for number, ax in enumerate(axes[0]):
        ax.set_title(f"draw {number}" if number else "original", fontsize=9, pad=4)
    axes[0, 0].title.set_color(BLUE)
    return axes


def misclassified_grid(results, images, *, count=10):
    """Shows wrongly classified pictures: true and predicted class, and the network's probabilities.

    `results`: a `Results` of `images`, uint8 (N, 3, H, W), of which it chooses at most `count`.
    There must be one. Returns the axes (rows, columns).
    """
    wrong = results.misclassified(count)
    captions = results.captions(wrong, class_names(results.classes))
    titles = [caption.replace(" → ", "\n→ ") for caption in captions]
    return image_grid(images[wrong], titles, columns=5)


def heat(images, maps, *, opacity=0.5):
    """Lays maps of what counts in pictures over them: (N, 3, H, W), uint8, on the CPU.

    `images`: uint8 (N, 3, H, W). `maps`: float (N, h, w), not negative; each is scaled to its own
    maximum and enlarged bilinearly. The colour is the more opaque the larger the value, up to
    `opacity`, and a map of zeros leaves its picture as it is.
    """
    maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo().tiny)
    maps = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")
    colours = 255 * torch.from_numpy(plt.cm.inferno(maps[:, 0].numpy())[..., :3]).movedim(3, 1)
    return torch.lerp(images.double(), colours, opacity * maps.double()).round().byte()


def lr_finder_curve(lrs, losses, *, raw_losses, suggestion, min_lr, max_lr, ax=None):
    """Plots the loss of a learning-rate range test and the rates chosen from it.

    `losses`, smoothed, and `raw_losses` are those at each of `lrs`. `suggestion`: where the loss
    falls fastest. `min_lr` and `max_lr`: where the schedule will start and peak. The loss axis ends
    shortly above what the loss was before its minimum, so that the divergence at the right runs
    out of the picture.
    """
    ax = _single(ax, (6.6, 3.6))
    ax.plot(lrs, raw_losses, color="#BBBBBB", linestyle="-", linewidth=0.8, label="raw")
    ax.plot(lrs, losses, color="black", linestyle="-", label="smoothed")
    losses = np.asarray(losses)
    lowest, before = losses.min(), losses[: losses.argmin() + 1].max()
    span = max(before - lowest, 0.1 * lowest)
    ax.set_ylim(ax.dataLim.y0 - 0.05 * span, before + 0.3 * span)
    for value, name, colour, style in (
        (min_lr, "min", GREEN, ":"),
        (suggestion, "suggestion", BLUE, "--"),
        (max_lr, "max", VERMILION, "-."),
    ):
        ax.axvline(value, color=colour, linestyle=style, label=f"{name} {value:.3g}")
    ax.set(xscale="log", xlabel="learning rate (log scale)", ylabel="loss")
    _legend_above(ax, 3)
    return ax


def lr_schedule(lrs, *, steps_per_epoch, ax=None):
    """Plots the learning rate of each optimizer step over epochs and names start, peak and end."""
    lrs = np.asarray(lrs)
    epochs = np.arange(len(lrs)) / steps_per_epoch
    peak = lrs.argmax()
    named = [0, peak, -1]

    ax = _single(ax, (6.0, 3.4))
    ax.plot(epochs, lrs, color=BLUE, linestyle="-", label="planned")
    ax.plot(epochs[named], lrs[named], color=VERMILION, linestyle="", marker="o")
    ax.set(xlabel="epoch", ylabel="learning rate")
    ax.set_title(
        f"start {lrs[0]:.3g}, peak {lrs[peak]:.3g} at epoch {epochs[peak]:.1f}, "
        f"end {lrs[-1]:.3g}", fontsize=9,
    )
    ax.grid(axis="y")
    return ax


def loss_curves(history, *, smoothed=False, ax=None):
    """Plots the loss of each epoch, the last ones as numbers.

    `history`: a dict for each epoch with `epoch`, `train_loss`, `test_loss` and perhaps `val_loss`.
    `smoothed`: whether the training loss is of smoothed labels, and so not to be compared.
    """
    return _epoch_curves([history], "loss", ax, "loss", digits=3, smoothed=smoothed)


def accuracy_curves(history, *, claimed=None, ax=None):
    """Plots the accuracy of each epoch, the last ones as numbers.

    `history`: a dict for each epoch with `epoch`, `train_acc`, `test_acc` and perhaps `val_acc`, in
    percent. `claimed`: {"train" or "test": accuracy to compare with}, drawn as thin lines in the
    colour of the curve.
    """
    return _epoch_curves([history], "acc", ax, "accuracy, %", claimed=claimed)


def accuracy_band(histories, *, ax=None):
    """Plots the mean accuracy of several runs by epoch, in a band from their lowest to highest.

    `histories`: one for each run, as for `accuracy_curves`, all of the same epochs.
    """
    label = f"accuracy, %: mean and range of {len(histories)} runs"
    return _epoch_curves(histories, "acc", ax, label)


def compare_curves(histories, published=None, *, ax=None):
    """Plots the test accuracy of several recipes by epoch, the last ones as numbers.

    `histories`: {name: DataFrame with `epoch` and `test_acc`}. `published`: the same of what the
    sources report; drawn thin, in the colour of the recipe of that name, grey without one. Runs
    may differ in length. The axis begins at half the lowest last accuracy, in tens; what lies
    below is cut off.
    """
    ax = _single(ax, (6.0, 4.4))
    colours = dict(zip(histories, cycle(COLOURS)))
    curves = []
    for name, rows in (published or {}).items():
        curves.append((f"{name}, source", rows, {
            "color": colours.get(name, GREY), "linestyle": "--", "linewidth": 0.9,
        }))
    for (name, rows), marker in zip(histories.items(), cycle("os^DvP")):
        curves.append((name, rows, {
            "color": colours[name], "linestyle": "-", "marker": marker, "markersize": 3.5,
        }))
    curves.sort(key=lambda curve: curve[1]["test_acc"].iloc[-1], reverse=True)
    for name, rows, style in curves:
        last = rows["test_acc"].iloc[-1]
        ax.plot(rows["epoch"], rows["test_acc"], label=f"{name} {last:.2f}", **style)
    ax.set_ylim(last // 20 * 10, 100)  # of the lowest
    _name_epochs(ax, "test accuracy, %")
    _legend_above(ax, 2)
    return ax


def ladder(rungs, *, ax=None):
    """Plots the accuracies of each rung, from the top down, and what it gained as a text.

    `rungs`: a DataFrame with `rung`, its name, `on`, the number from 1 of the one it stands on,
    `kept`, "yes" or "no", `accuracies`, a list in percent, their `mean`, and `gain`, a text. The
    line goes through what was kept. The axis begins below the second rung's accuracies, or lower
    ones of a later rung; the first rung's mean stands in its place for the gain.
    """
    ax = _single(ax, (6.0, 0.7 + 0.4 * len(rungs)))
    for y, row in enumerate(rungs.itertuples()):
        ax.plot(row.accuracies, [y] * len(row.accuracies), "o", color=GREY, markersize=3, zorder=3)
        ax.annotate(
            f"{row.gain} on {row.on}" if y else f"{row.mean:.2f}", (1.02, y), va="center",
            annotation_clip=False, xycoords=ax.get_yaxis_transform(),
        )
    ax.plot(rungs["mean"], rungs.index, "D", color=BLUE, markersize=6, markerfacecolor="white")
    kept = rungs[rungs["kept"] == "yes"]
    ax.plot(kept["mean"], kept.index, "D-", color=BLUE, markersize=6)
    names = [textwrap.fill(f"{y + 1}  {name}", 28) for y, name in enumerate(rungs["rung"])]
    ax.set_yticks(rungs.index, labels=names)
    ax.set_xlim(min(map(min, rungs["accuracies"][1:])) - 0.5)
    ax.invert_yaxis()
    ax.grid(axis="x")
    ax.set_xlabel("accuracy on held-out images, %")
    return ax


def confusion_matrix(results, *, ax=None):
    """Draws the confusion matrix of a `Results`: the counts as numbers, the errors as colour.

    The colour is the share of the true class, in percent. The diagonal stays grey: its counts are
    so much larger that they would hide the errors. For more than 20 classes the numbers, too small
    to be read, are left out.
    """
    counts = results.confusion.numpy()
    number = len(results.classes)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    errors = np.ma.masked_array(shares, mask=np.eye(number, dtype=bool))
    names = [as_text(name) for name in class_names(results.classes)]

    side = min(3.0 + 0.42 * number, 12.0)
    ax = _single(ax, (side, 0.9 * side))
    # The square root lifts the many small shares off white.
    norm = PowerNorm(0.5, vmin=0, vmax=errors.max() or 1)
    colours = plt.get_cmap("Blues").with_extremes(bad="#E0E0E0")
    image = ax.imshow(errors, cmap=colours, norm=norm)
    ax.figure.colorbar(image, ax=ax, label="share of the true class, %", shrink=0.7)
    ax.set_xticks(range(number), names, ha="right", va="center", rotation_mode="anchor",
                  rotation=45 if number <= 20 else 90)
    ax.set_yticks(range(number), names)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="predicted class", ylabel="true class", anchor="W")
    ax.tick_params(labelsize=min(9, 500 / number), length=0)
    dark = norm(errors).filled(0) > 0.6
    for row, column in np.ndindex(counts.shape) if number <= 20 else ():
        ax.text(
            column, row, counts[row, column], ha="center", va="center", fontsize=8,
            color="white" if dark[row, column] else "black",
            fontweight="bold" if row == column else "normal",
        )
    return ax


def per_class_accuracy(results, *, ax=None):
    """Draws the accuracy of each class of a `Results` as a bar, the best on top, and their mean."""
    accuracies = pd.Series(results.per_class).sort_values(kind="stable")
    names = dict(zip(results.classes, class_names(results.classes), strict=True))
    mean = accuracies.mean()

    ax = _single(ax, (5.6, 1.0 + 0.24 * len(accuracies)))
    ax.barh(range(len(accuracies)), accuracies, color=SKY, height=0.75)
    ax.set_yticks(range(len(accuracies)), [as_text(names[name]) for name in accuracies.index])
    for row, accuracy in enumerate(accuracies):  # a short bar's number runs out of it
        ax.text(max(accuracy, 12) - 1, row, f"{accuracy:.1f} %", ha="right", va="center_baseline")
    ax.tick_params(axis="y", length=0)
    ax.axvline(mean, color=VERMILION, linestyle="-", zorder=0.5)  # behind bars and numbers
    ax.text(mean, 1.0, f"mean {mean:.2f} %", transform=ax.get_xaxis_transform(),
            color=VERMILION, ha="center", va="bottom")
    ax.set(xlim=(0, 100), ylim=(-0.6, len(accuracies) - 0.4), xlabel="accuracy, %")
    return ax


def calibration(results, *, ax=None):
    """Draws the reliability diagram of a `Results`: accuracy against confidence, bin by bin.

    A point is a bin's accuracy at its mean confidence: below the diagonal the network is surer
    than right. Bins of fewer than 20 images have none: chance decides there. The bars are the
    shares of the images, with their numbers.
    """
    counts, confidences, accuracies = (each.numpy() for each in results.calibration)
    accuracies = np.where(counts < 20, np.nan, accuracies)
    width = 100 / len(counts)
    ax = _single(ax, (5.4, 4.6))
    bars = ax.bar(width * (np.arange(len(counts)) + 0.5), 100 * counts / counts.sum(), 0.9 * width,
                  color="#DDDDDD", label="share of images")
    ax.bar_label(bars, [f"{n:,}" if n else "" for n in counts], color=GREY, fontsize=8)
    ax.plot([0, 100], [0, 100], color="black", linestyle=":", label="perfect calibration")
    ax.vlines(confidences, confidences, accuracies, color=VERMILION, linewidth=3,
              label=f"gap, on average {results.calibration_error:.2f} % (ECE)")
    ax.plot(confidences, accuracies, color=BLUE, linestyle="", marker="o", label="accuracy")
    ax.set(xlim=(0, 101), ylim=(0, 104), xlabel="confidence, %", ylabel="accuracy, %")
    _legend_above(ax, 2)
    return ax


def time_by_phase(phases, *, ax=None):
    """Draws where the time of a training step goes, as a stacked bar for each way to train.

    `phases`: {way: {phase: milliseconds an image}}, the same four phases in each; the first way
    is on top. A number stands where there is room for it, and that of the whole bar at its end.
    """
    table = pd.DataFrame(phases).T
    totals = table.sum(axis=1)
    ax = _single(ax, (6.4, 1.5 + 0.5 * len(table)))
    table.plot.barh(stacked=True, ax=ax, width=0.6, color=[VERMILION, SKY, ORANGE, GREEN])
    for bars in ax.containers:
        ax.bar_label(bars, fmt=lambda time: f"{time:.3g}" if time > 0.08 * totals.max() else "",
                     label_type="center")
    ax.bar_label(ax.containers[-1], [f"{total:.3g} ms" for total in totals], padding=4)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 1.14 * totals.max()), xlabel="milliseconds an image")
    _legend_above(ax)
    return ax


def network(model, *, size=32, ax=None):
    """Draws a network as a row of boxes, from the input, size × size, at the left to the logits.

    Names, layers, shapes and numbers of parameters are the model's own: a box is one of its
    children, or of the parts of a child that has one called `residual`. Around a box whose name
    begins with "res" goes a skip connection. A box is as high as its output and as wide as its
    channels, both by square root; the output's shape stands above it. The texts keep their size,
    so they collide in axes much smaller than a new figure's, an inch for a box.
    """
    stages = _stages(model, size)
    floor = -1.3 - 0.14 * max(len(operations) for _, operations, _, _ in stages)
    widest = max(shape[0] for *_, shape in stages)
    total = sum(parameters for _, _, parameters, _ in stages)
    ax = _single(ax, (len(stages) + 0.1, 2.05 - floor))
    ax.set(xlim=(-0.55, len(stages) - 0.45), ylim=(floor - 0.15, 1.55), aspect="equal")
    ax.set_axis_off()
    ax.set_title(f"{type(model).__name__}: {total:,} parameters", fontsize=11)

    def arrow(start, end, **style):
        ax.annotate("", (end, 0), (start, 0), arrowprops={
            "arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0, **style,
        })

    small = {"ha": "center", "va": "top", "fontsize": 8}
    radius = 7  # of a sum's circle, in points
    end = 0  # of the signal so far
    for x, (name, operations, parameters, shape) in enumerate(stages):
        height = 2 * math.sqrt(max(shape[1:], default=1) / size)
        width = max(0.6 * math.sqrt(shape[0] / widest), 0.08)
        skipped = name.split("\n")[-1].startswith("res")
        colour = ORANGE if skipped else SKY
        if x:
            arrow(end, x - width / 2)
        end = x + width / 2
        ax.bar(x, height, width, -height / 2, color=colour if parameters else "#C8C8C8",
               edgecolor="black", linewidth=0.8)
        ax.text(x, 1.35, name, ha="center", va="center", fontsize=9.5, fontweight="bold")
        ax.text(x, height / 2 + 0.2, "×".join(map(str, shape)), **small)
        ax.text(x, -1.12, "\n".join(operations), **small)
        ax.text(x, floor, f"{parameters:,}" if x else "parameters", color=GREY, **small)
        if skipped:
            arrow(end, x + 0.5, shrinkB=radius)
            arrow(x - 0.5, x + 0.5, shrinkB=radius, color=VERMILION,
                  connectionstyle=f"bar,fraction={-height / 2 - 0.28}")
            end = x + 0.5
            ax.plot(end, 0, marker="$\\oplus$", markersize=2 * radius, color="black", mew=0.3)
    return ax


def _stages(model, size):
    """[(name, operations, number of parameters, output's shape)] in the order they run in."""
    model = copy.deepcopy(model).to("meta").float().eval()  # which computes shapes, but no numbers
    parts = {}
    for name, child in model.named_children():
        if hasattr(child, "residual"):
            parts |= {f"{name}\n{part}": module for part, module in child.named_children()}
        else:
            parts[name] = child
    stages = [("input", [], 0, (3, size, size))]
    for name, part in parts.items():
        layers = [layer for layer in part.modules() if type(layer) in OPERATIONS]
        text = "\n".join(OPERATIONS[type(layer)].format(layer) for layer in layers)
        operations = text.replace("BN\nReLU", "BN, ReLU").split("\n")
        row = name, operations, sum(parameter.numel() for parameter in part.parameters())
        part.register_forward_hook(lambda part, x, y, row=row: stages.append((*row, y.shape[1:])))
    model(torch.zeros(1, 3, size, size, device="meta"))
    return stages


def _pixels(images):
    """Turns (N, 3, H, W) into the array (N, H, W, 3) that matplotlib shows.

    Raises ValueError for floats outside 0..1.
    """
    images = images.cpu()
    if images.is_floating_point():
        # Undoing a normalisation leaves rounding errors; anything larger is a mistake.
        if not -1e-3 <= images.min() <= images.max() <= 1 + 1e-3:
            raise ValueError(
                f"float images must lie in 0..1, got {images.min():.2f}..{images.max():.2f}: "
                "undo the normalisation first"
            )
        images = images.clamp(0, 1)
    return images.permute(0, 2, 3, 1).numpy()


def _single(ax, size):
    if ax is None:
        _, ax = plt.subplots(figsize=size)
    return ax


def _grid(rows, columns, cell, *, left=0.0):
    """New axes (rows, columns) of `cell` inches each.

    `left`: inches for labels at the left of the rows.
    """
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, layout="constrained",
        figsize=(max(left + cell[0] * columns, 2.0), max(cell[1] * rows, 1.2)),
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    return axes


def _show(ax, picture=None):
    if picture is not None:
        ax.imshow(picture)
    ax.set(xticks=[], yticks=[])  # set_axis_off would hide the label at the left of a row too
    ax.spines[:].set_visible(False)


def _legend_above(ax, columns=4):
    ax.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2,
              columnspacing=1.2, handlelength=1.7)


def _epoch_curves(runs, quantity, ax, label, *, digits=2, claimed=None, smoothed=False):
    """Plots a quantity by epoch: the runs' mean and range, and thin lines for what was claimed."""
    ax = _single(ax, (6.0, 3.6))
    rows = pd.concat(map(pd.DataFrame, runs)).select_dtypes("number")
    rows = rows.groupby("epoch").agg(["mean", "min", "max"])
    for name, style in LINES.items():
        if f"{name}_{quantity}" not in rows:
            continue
        mean, low, high = rows[f"{name}_{quantity}"].to_numpy().T
        shown = "train (smoothed)" if smoothed and name == "train" else name
        text = f"{shown} {mean[-1]:.{digits}f}"
        if len(runs) > 1:
            ax.fill_between(rows.index, low, high, color=style["color"], alpha=0.25, linewidth=0)
            text += f" ({low[-1]:.{digits}f}–{high[-1]:.{digits}f})"
        ax.plot(rows.index, mean, label=text, **style)
    for name, value in (claimed or {}).items():
        ax.axhline(value, color=LINES[name]["color"], linestyle=":", linewidth=1,
                   label=f"claimed {name} {value:.{digits}f}")
    _name_epochs(ax, label)
    ax.legend()
    return ax


def _name_epochs(ax, label):
    ax.set(xlabel="epoch", ylabel=label)
    ax.set_xlim(left=0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(axis="y")
