"""The custom ResNet: its parameters, its shapes, its order of layers and its residuals."""

import pytest
import torch
from torch import nn

from utils import InputError
from utils.models import CustomResNet, ResidualLayer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CustomResNet().eval()


@pytest.mark.parametrize("fc_bias, count", [(True, 6_573_130), (False, 6_573_120)])
def test_parameter_count(fc_bias, count):
    parameters = CustomResNet(fc_bias=fc_bias).parameters()
    assert sum(p.numel() for p in parameters if p.requires_grad) == count


def test_shape_after_each_layer(model):
    shapes = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
        for name, layer in model.named_children()
    ]
    with torch.inference_mode():
        model(torch.zeros(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert shapes == {
        "prep": (2, 64, 32, 32),
        "layer1": (2, 128, 16, 16),
        "layer2": (2, 256, 8, 8),
        "layer3": (2, 512, 4, 4),
        "pool": (2, 512, 1, 1),
        "fc": (2, 10),
    }


def _kinds(module):
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, nn.ReLU, nn.Linear)
    return [type(m).__name__ for m in module.modules() if isinstance(m, kinds)]


def test_order_of_layers(model):
    plain = ["Conv2d", "BatchNorm2d", "ReLU"]
    pooled = ["Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"]
    assert _kinds(model.prep) == plain
    assert _kinds(model.layer2) == pooled
    for layer in (model.layer1, model.layer3):
        assert _kinds(layer.conv) == pooled
        assert _kinds(layer.residual) == plain + plain
    assert _kinds(model)[-2:] == ["MaxPool2d", "Linear"]  # and so no softmax


def test_convolutions_keep_the_size_and_have_no_bias(model):
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    settings = {(c.kernel_size, c.stride, c.padding, c.bias) for c in convolutions}
    assert settings == {((3, 3), (1, 1), (1, 1), None)}


def test_residual_is_x_plus_r_of_x():
    layer = ResidualLayer(3, 8).eval()
    images = torch.randn(2, 3, 8, 8)
    x = layer.conv(images)
    assert torch.equal(layer(images), x + layer.residual(x))
    assert (layer.residual(x) != 0).any()


@pytest.mark.parametrize("size", [32, 64])
@torch.inference_mode()
def test_output_is_the_linear_layer_of_the_pooled_features(model, size):
    """Logits: nothing follows the linear layer. Of a larger image every place counts."""
    images = torch.randn(2, 3, size, size)
    features = model.layer3(model.layer2(model.layer1(model.prep(images))))
    blocks = features.unflatten(2, (-1, 4)).unflatten(4, (-1, 4))
    pooled = blocks.amax((3, 5)).mean((2, 3))
    logits = model(images)
    torch.testing.assert_close(logits, pooled @ model.fc.weight.T + model.fc.bias)
    assert (logits < 0).any()


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (64, 64), (40, 36)])
def test_other_sizes_and_numbers_of_classes(size):
    with torch.inference_mode():
        logits = CustomResNet(3)(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3) and logits.isfinite().all()


@pytest.mark.parametrize("size", [(31, 32), (32, 31), (28, 28)])
def test_too_small_an_image(model, size):
    with pytest.raises(InputError, match="×".join(map(str, size))):
        model(torch.zeros(1, 3, *size))
