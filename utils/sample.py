"""A small drawn stand-in for CIFAR-10: ten classes of 32 × 32 pictures, made by code from a seed.

Six shapes and four textures are drawn in random colours, places, sizes and rotations on a shaded,
grainy background. A linear model on the pixels does poorly, a small convolutional network learns
the classes in `EPOCHS` epochs of batches of `BATCH_SIZE`, and no class changes under a flip.
"""

from types import SimpleNamespace

import numpy as np
import torch

# How far inside the shape the points `p` lie (outside: negative), in radii of the shape.
DEPTHS = {
    "disc": lambda p: 0.9 - p.r,
    "ring": lambda p: 0.2 - abs(p.r - 0.8),
    "square": lambda p: 0.8 - p.far,
    # three half-planes
    "triangle": lambda p: 0.55 - p.r * np.max(
        [np.cos(p.theta - k * 2 * np.pi / 3) for k in range(3)], axis=0
    ),
    "cross": lambda p: np.minimum(0.27 - p.near, 1 - p.far),
    # folded to half a point, where its edge is one straight line
    "star": lambda p: 0.42 - p.r * np.cos(
        abs((p.theta / (2 * np.pi) * 5) % 1 - 0.5) * 2 * np.pi / 5 - 1.18
    ),
    "stripes": lambda p: np.sin(6 * p.u) / 6,
    "checks": lambda p: _smaller(np.sin(4.5 * p.u), np.sin(4.5 * p.v)) / 4.5,
    "dots": lambda p: 0.26 - np.hypot((p.u + 0.4) % 0.8 - 0.4, (p.v + 0.4) % 0.8 - 0.4),
    "waves": lambda p: np.sin(6 * p.u + 1.6 * np.sin(5 * p.v)) / 8,
}
CLASSES = tuple(DEPTHS)
TRAIN, TEST = 800, 400
EPOCHS = 6
BATCH_SIZE = 32

SIDE = 32
CHOICES = 11  # random numbers that settle a picture, but for its grain


def draw_sample():
    """Balanced training and test sets, the same pictures anywhere.

    Returns train_images, train_labels, test_images, test_labels: images uint8 (N, 3, 32, 32), RGB;
    labels int64 (N,), positions in `CLASSES`, which run 0, 1, …, 9, 0, 1, …

    Example:
        >>> train_images, train_labels, _, _ = draw_sample()
        >>> train_images.shape, CLASSES[train_labels[3]]
        (torch.Size([800, 3, 32, 32]), 'triangle')
    """
    train_images, train_labels = _draw(TRAIN, seed=0)
    test_images, test_labels = _draw(TEST, seed=1)
    return train_images, train_labels, test_images, test_labels


def _draw(count, *, seed):
    labels = np.arange(count) % len(CLASSES)
    # One row of uniform numbers a picture. PCG64 and `random` are exact on every platform.
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = generator.random((count, CHOICES + 3 * SIDE * SIDE))
    choices = rows[:, :CHOICES].T.reshape(CHOICES, count, 1, 1, 1)
    left, down, size, turn, light, dark, hue, vivid, level, ground_hue, ground_level = choices
    grain = rows[:, CHOICES:].reshape(count, 3, SIDE, SIDE)

    # Pixels from the middle of the picture, then in the frame of the shape, whose radius is 1.
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius, angle = 9 + 4 * size, 2 * np.pi * turn
    across, along = x - 6 * (left - 0.5), y - 6 * (down - 0.5)
    u = (np.cos(angle) * across + np.sin(angle) * along) / radius
    v = (np.cos(angle) * along - np.sin(angle) * across) / radius

    depth = np.empty((count, 1, SIDE, SIDE))
    for label, depth_of in enumerate(DEPTHS.values()):
        own = labels == label
        depth[own] = depth_of(_points(u[own], v[own]))
    # A pixel on the edge is covered in part: smooth outlines.
    cover = np.clip(0.5 + depth * radius, 0, 1)

    dark = dark < 0.5  # a bright figure on a dark ground, or the other way round
    figure = _colour(hue, 0.16 + 0.2 * vivid, np.where(dark, 0.74, 0.32) + 0.14 * (level - 0.5))
    ground = _colour(ground_hue, 0.1, np.where(dark, 0.2, 0.82) + 0.14 * (ground_level - 0.5))
    shade = 0.24 / SIDE * (np.cos(2 * np.pi * light) * x + np.sin(2 * np.pi * light) * y)
    picture = ground + cover * (figure - ground) + shade + 0.16 * (grain - 0.5)
    # Rounds to the nearest; the grain keeps values off the halves, where platforms might differ.
    pixels = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _points(u, v):
    """Points in the frame of a shape: Cartesian, polar, and folded along the axes and diagonals."""
    return SimpleNamespace(
        u=u, v=v, r=np.hypot(u, v), theta=np.arctan2(v, u),
        near=np.minimum(abs(u), abs(v)), far=np.maximum(abs(u), abs(v)),
    )


def _smaller(a, b):
    """The smaller one in size of each pair, positive where both have the same sign."""
    return np.sign(a * b) * np.minimum(abs(a), abs(b))


def _colour(hue, strength, level):
    """Colours (N, 3, 1, 1) at a distance `strength` from a grey, `hue` in turns of the wheel."""
    return level + strength * np.cos(2 * np.pi * (hue - np.arange(3).reshape(3, 1, 1) / 3))
