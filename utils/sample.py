"""A small drawn stand-in for CIFAR-10: ten classes of 32 × 32 pictures, made by code from a seed.

Six shapes and four textures are drawn in random colours, places, sizes and rotations on a shaded,
grainy background. A linear model on the pixels does poorly, a small convolutional network learns
the classes in `EPOCHS` epochs of batches of `BATCH_SIZE`, and no class changes under a flip.
"""

import numpy as np
import torch

CLASSES: tuple[str, ...] = (
    "disc", "ring", "square", "triangle", "cross", "star", "stripes", "checks", "dots", "waves"
)
EPOCHS = 6
BATCH_SIZE = 32

SIDE = 32
CHOICES = 11  # random numbers that settle a picture, but for its grain


def draw_sample(
    train_per_class: int = 80, test_per_class: int = 40, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw balanced training and test sets; the same arguments give the same pictures anywhere.

    The two sets come from separate random streams, and picture i is the same however many are
    drawn after it. Labels run 0, 1, …, 9, 0, 1, …, so any multiple of ten pictures is balanced.

    Args:
        train_per_class: training pictures of each class.
        test_per_class: test pictures of each class.
        seed: a non-negative integer; another one gives other pictures of the same classes.

    Returns:
        train_images, train_labels, test_images, test_labels: images uint8, (N, 3, 32, 32), RGB;
        labels int64, (N,), indices into `CLASSES`.

    Example:
        >>> train_images, train_labels, _, _ = draw_sample(2, 1)
        >>> train_images.shape, CLASSES[train_labels[3]]
        (torch.Size([20, 3, 32, 32]), 'triangle')
    """
    return *_draw(train_per_class, seed, stream=0), *_draw(test_per_class, seed, stream=1)


def _draw(per_class: int, seed: int, *, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = per_class * len(CLASSES)
    labels = np.arange(count) % len(CLASSES)
    # One row of uniform numbers a picture. PCG64 and `random` are exact on every platform.
    generator = np.random.Generator(np.random.PCG64([stream, seed]))
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
    for label, name in enumerate(CLASSES):
        own = labels == label
        depth[own] = _depth(name, u[own], v[own])
    # A pixel on the edge is covered in part: smooth outlines.
    cover = np.clip(0.5 + depth * radius, 0, 1)

    dark = dark < 0.5  # a bright figure on a dark ground, or the other way round
    figure = _colour(hue, 0.16 + 0.2 * vivid, np.where(dark, 0.74, 0.32) + 0.14 * (level - 0.5))
    ground = _colour(ground_hue, 0.1, np.where(dark, 0.2, 0.82) + 0.14 * (ground_level - 0.5))
    shade = 0.24 / SIDE * (np.cos(2 * np.pi * light) * x + np.sin(2 * np.pi * light) * y)
    picture = ground + cover * (figure - ground) + shade + 0.16 * (grain - 0.5)
    # Rounds to the nearest; the grain keeps values off the halves, where platforms might differ.
    pixels = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


def _depth(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How far inside the shape the points lie (outside: negative), in radii of the shape."""
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    near, far = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    match name:
        case "disc":
            return 0.9 - r
        case "ring":
            return 0.2 - abs(r - 0.8)
        case "square":
            return 0.8 - far
        case "triangle":  # three half-planes
            third = 2 * np.pi / 3
            return 0.55 - r * np.max([np.cos(theta - k * third) for k in range(3)], axis=0)
        case "cross":
            return np.minimum(0.27 - near, 1 - far)
        case "star":  # folded to half a point, where its edge is one straight line
            fold = abs((theta / (2 * np.pi) * 5) % 1 - 0.5) * 2 * np.pi / 5
            return 0.42 - r * np.cos(fold - 1.18)
        case "stripes":
            return np.sin(6 * u) / 6
        case "checks":
            a, b = np.sin(4.5 * u), np.sin(4.5 * v)
            return np.sign(a * b) * np.minimum(abs(a), abs(b)) / 4.5
        case "dots":
            return 0.26 - np.hypot((u + 0.4) % 0.8 - 0.4, (v + 0.4) % 0.8 - 0.4)
        case "waves":
            return np.sin(6 * u + 1.6 * np.sin(5 * v)) / 8
    raise ValueError(name)


def _colour(hue: np.ndarray, strength: np.ndarray | float, level: np.ndarray) -> np.ndarray:
    """Colours (N, 3, 1, 1) at a distance `strength` from a grey, `hue` in turns of the wheel."""
    return level + strength * np.cos(2 * np.pi * (hue - np.arange(3).reshape(3, 1, 1) / 3))
