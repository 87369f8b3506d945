"""One prediction in depth: how sure it is, where the network looked, and what it resembles.

`model` is a network of `models.load_weights`, `images` are uint8 (N, 3, H, W); all results lie on
the CPU.
"""

import torch
from captum.attr import LayerGradCam
from torch.nn import functional as F

from utils.data import Normalization
from utils.progress import progress_bar
from utils.results import Results


def inputs(model, images):
    """The images as the network wants them, which is put into evaluation mode: normalised float,
    on its device."""
    model.eval()
    device = next(model.parameters()).device
    normalize = Normalization(model.mean, model.std)
    return normalize(images.to(device)).to(memory_format=torch.channels_last)


@torch.inference_mode()
def _outputs(function, model, images, desc):
    """What `function` makes of the images, a batch of 500 at a time: float, on the CPU."""
    batches = progress_bar(images.split(500), desc=desc)
    return torch.cat([function(inputs(model, batch)).float().cpu() for batch in batches])


def probabilities(model, images):
    """That of each class, float (N, C)."""
    return _outputs(model, model, images, "pictures").softmax(1)


def predictions(model, images):
    """`Results` of the test images of an `ImageData`. Raises InputError for other classes."""
    images.check_classes(model.classes)
    logits = _outputs(model, model, images.test_images, "test images")
    return Results(logits, images.test_labels, images.classes)


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
    """What the linear layer sees of each image, float (N, 512), at length 1."""
    return F.normalize(_outputs(model.embed, model, images, "features"))


def nearest(ours, theirs, count=3):
    """For each of `ours` the `count` most similar of `theirs`, both by `embeddings`.

    Indices int64 (N, count), by the cosine of the angle between them.
    """
    return (ours @ theirs.T).topk(count).indices
