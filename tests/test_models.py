"""Both networks: their parameters, their shapes, their order of layers and their residuals."""

import pytest
import torch
from torch import nn

from utils import InputError
from utils.models import (
    CustomResNet,
    ResidualLayer,
    ResNet9,
    dirac_init,
    make_model,
    whiten_init,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CustomResNet().eval()


@pytest.mark.parametrize("name, fc_bias, count", [
    ("custom_resnet", True, 6_573_130), ("custom_resnet", False, 6_573_120),
    ("resnet9", True, 6_575_370), ("resnet9", False, 6_575_360),
])
def test_parameter_count(name, fc_bias, count):
    parameters = make_model(name, fc_bias=fc_bias).parameters()
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


@pytest.mark.parametrize("network", [CustomResNet, ResNet9])
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (40, 36), (24, 24), (20, 16), (8, 31)])
def test_other_sizes_and_numbers_of_classes(network, size):
    with torch.inference_mode():
        logits = network(3)(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3) and logits.isfinite().all()


@pytest.mark.parametrize("network", [CustomResNet, ResNet9])
@pytest.mark.parametrize("size", [(7, 32), (32, 7), (4, 4)])
def test_too_small_an_image(network, size):
    with pytest.raises(InputError, match="×".join(map(str, size))):
        network()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("size", [8, 16, 20, 24])
@torch.inference_mode()
def test_of_a_small_image_the_last_pool_takes_all(model, size):
    images = torch.randn(2, 3, size, size)
    features = model.layer3(model.layer2(model.layer1(model.prep(images))))
    torch.testing.assert_close(model(images), model.fc(features.amax((2, 3))))


def test_resnet9_pools_after_batch_norm_and_relu():
    model = ResNet9()
    plain = ["Conv2d", "BatchNorm2d", "ReLU"]
    pooled = [*plain, "MaxPool2d"]
    assert _kinds(model) == [
        *plain, *pooled, *plain, *plain, *pooled, *pooled, *plain, *plain, "MaxPool2d", "Linear"
    ]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {(c.kernel_size, c.padding, c.bias is None) for c in convolutions} == {
        ((3, 3), (1, 1), False)
    }


@torch.inference_mode()
def test_resnet9_adds_each_residual_and_pools_what_is_left():
    model = ResNet9().eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.conv2(model.conv1(images))
    x = model.conv4(model.conv3(x + model.res1(x)))
    x = x + model.res2(x)
    assert x.shape == (2, 512, 4, 4)
    torch.testing.assert_close(model(images), model.fc(x.amax((2, 3))))


def test_unknown_model_lists_the_names():
    with pytest.raises(InputError, match="^unknown model 'resnet'; .* custom_resnet, resnet9$"):
        make_model("resnet")


def test_dirac_init_passes_the_input_on():
    model = CustomResNet()
    first, others = model.prep[0].weight.clone(), model.layer1.conv[0].weight[64:].clone()
    dirac_init(model)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(model.layer1.conv[0](x)[:, :64], x)
    assert torch.equal(model.prep[0].weight, first)
    assert torch.equal(model.layer1.conv[0].weight[64:], others)


def test_whiten_init_makes_the_outputs_uncorrelated():
    model = CustomResNet()
    random = model.prep[0].weight[54:].clone()
    images = nn.functional.avg_pool2d(torch.randn(64, 3, 34, 34), 3, stride=1)  # neighbours alike
    whiten_init(model, images)
    outputs = nn.functional.conv2d(images, model.prep[0].weight).transpose(0, 1).flatten(1)
    covariance = outputs[:27].double().cov()
    # All but the smallest variances, where the 0.01 that keeps noise down counts.
    torch.testing.assert_close(
        covariance[:3, :3], torch.eye(3, dtype=torch.double), rtol=0, atol=0.05
    )
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    assert torch.equal(model.prep[0].weight[54:], random)
