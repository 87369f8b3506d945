"""One prediction in depth: probabilities, Grad-CAM, features."""

import pytest
import torch
from torch.nn import functional as F

from utils import explain
from utils.data import ImageData
from utils.models import CustomResNet

MEAN, STD = (0.5, 0.25, 0.125), (0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CustomResNet(3).eval()
    model.mean, model.std = MEAN, STD
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)


def normalised(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def test_probabilities_are_the_softmax_of_normalised_images(model, images):
    with torch.no_grad():
        expected = model(normalised(images)).softmax(1)
    torch.testing.assert_close(explain.probabilities(model, images), expected)


def test_predictions_are_made_in_the_precision_that_is_asked_for(model, images):
    images = ImageData("five", ("a", "b", "c"), *[images, torch.tensor([0, 1, 2, 0, 1])] * 2)
    model.classes = images.classes
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            expected = model(normalised(images.test_images)).float()
        found = explain.predictions(model, images, dtype=dtype).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    full = explain.predictions(model, images).logits
    assert not torch.equal(found, full)


@pytest.mark.parametrize("layer, side", [("layer3", 2), ("layer1", 8)])
def test_grad_cam_by_hand(model, images, layer, side):
    """Activations weighted by the mean gradient of the class's logit, without what speaks against.
    """
    classes = torch.tensor([0, 1, 2, 2, 0])
    kept = []
    handle = getattr(model, layer).register_forward_hook(lambda *args: kept.append(args[-1]))
    logits = model(normalised(images))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(5), classes].sum(), kept)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    expected = (weights * kept[0]).sum(dim=1).relu().detach()
    found = explain.grad_cam(model, images, classes, layer=layer)
    assert found.shape == (5, side, side) and expected.max() > 0
    torch.testing.assert_close(found, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_embeddings_have_length_one_and_decide(model, images):
    found = explain.embeddings(model, images)
    with torch.no_grad():
        expected = F.normalize(model.embed(normalised(images)))
    torch.testing.assert_close(found, expected)
