"""One prediction in depth: how sure it is, where the network looked, and what it resembles.

`model` is a network of `models.load_weights`, `images` are uint8 (N, 3, H, W); all results lie on
the CPU.
"""

from dataclasses import replace

import torch
from captum.attr import LayerGradCam
from torch.nn import functional as F

from utils.data import Normalization
from utils.devices import autocast
from utils.progress import progress_bar
from utils.results import Results

BATCH_SIZE = 500


def inputs(model, images):
    """The images as the network wants them, which is put into evaluation mode: normalised float,
    on its device."""
    model.eval()
    device = next(model.parameters()).device
    normalize = Normalization(model.mean, model.std)
    return normalize(images.to(device)).to(memory_format=torch.channels_last)


@torch.inference_mode()
def _outputs(function, model, images, desc, dtype=None):
    """What `function` makes of the images, batch by batch: float, on the CPU."""
    outputs = []
    for batch in progress_bar(images.split(BATCH_SIZE), desc=desc):
        x = inputs(model, batch)
        with autocast(x.device, dtype):
            outputs.append(function(x).float().cpu())
    return torch.cat(outputs)


def probabilities(model, images):
    """That of each class, float (N, C)."""
    return _outputs(model, model, images, "pictures").softmax(1)


def predictions(model, images, *, dtype=None):
    """`Results` of the test images of an `ImageData`. Raises InputError for other classes.

    `dtype`: of mixed precision; None: float32.
    """
    images.check_classes(model.classes)
    logits = _outputs(model, model, images.test_images, "test images", dtype)
    return Results(logits, images.test_labels, images.classes)


def plain_and_flipped(model, images, *, dtype=None):
    """Two `Results`: `predictions`, and the same with test-time flip.

    That averages the logits of an image and of its mirror image.
    """
    mirror_images = replace(images, test_images=images.test_images.flip(3))
    plain = predictions(model, images, dtype=dtype)
    mirrored = predictions(model, mirror_images, dtype=dtype)
    return plain, replace(plain, logits=(plain.logits + mirrored.logits) / 2)


def grad_cam(model, images, classes, *, layer="layer3"):
    """Where the network saw evidence for a class: float (N, h, w), at least 0.

    `classes`: int64 (N,), one for each image. `layer`: which of the network's parts to look at;
    h and w are the sides of its output.
    Source: Selvaraju et al., "Grad-CAM" (2017).
    """
    cam = LayerGradCam(model, getattr(model, layer))
    x = inputs(model, images)
    return cam.attribute(x, classes.to(x.device), relu_attributions=True)[:, 0].detach().cpu()


def embeddings(model, images):
    """What the linear layer sees of each image, float (N, 512), at length 1: the product of two is
    the cosine of the angle between them."""
    return F.normalize(_outputs(model.embed, model, images, "features"))
