"""Both networks: parameters, shapes, layers and residuals; first weights and those of a file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import Small, assert_same_state, tiny_images
from utils import InputError, files, run
from utils.models import (
    MODELS,
    CustomResNet,
    ResidualLayer,
    ResNet9,
    build,
    dirac_init,
    load_weights,
    pretrained,
    whiten,
)
from utils.recipes import Recipe, recipe
from utils.transforms import Normalization


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CustomResNet().eval()


@pytest.mark.parametrize("name, fc_bias, count", [
    ("custom_resnet", True, 6_573_130), ("custom_resnet", False, 6_573_120),
    ("resnet9", True, 6_575_370), ("resnet9", False, 6_575_360),
])
def test_parameter_count(name, fc_bias, count):
    parameters = MODELS[name](fc_bias=fc_bias).parameters()
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


# First weights


def test_dirac_init_passes_the_input_on():
    model = CustomResNet()
    first, others = model.prep[0].weight.clone(), model.layer1.conv[0].weight[64:].clone()
    dirac_init(model)
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert len(convolutions) == 8
    for conv in convolutions[1:]:
        x = torch.randn(2, conv.in_channels, 8, 8)
        assert torch.equal(conv(x)[:, : conv.in_channels], x)
    assert torch.equal(model.prep[0].weight, first)
    assert torch.equal(model.layer1.conv[0].weight[64:], others)


def test_whitening_makes_the_outputs_uncorrelated():
    model = CustomResNet()
    random = model.prep[0].weight[54:].clone()
    images = nn.functional.avg_pool2d(torch.randn(64, 3, 34, 34), 3, stride=1)  # neighbours alike
    whiten(model, images)
    outputs = nn.functional.conv2d(images, model.prep[0].weight).transpose(0, 1).flatten(1)
    covariance = outputs[:27].double().cov()
    # All but the smallest variances, where the 0.01 that keeps noise down counts.
    torch.testing.assert_close(
        covariance[:3, :3], torch.eye(3, dtype=torch.double), rtol=0, atol=0.05
    )
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    assert torch.equal(model.prep[0].weight[54:], random)


@pytest.mark.parametrize("name", MODELS)
def test_a_quarter_of_the_width_is_a_sixteenth_of_the_convolutions(name):
    whole, quarter = ([p.numel() for p in MODELS[name](width=width).parameters() if p.ndim == 4]
                      for width in (64, 16))
    assert [count // 16 for count in whole[1:]] == quarter[1:] and whole[0] // 4 == quarter[0]


def test_weights_file_knows_the_width(tmp_path):
    narrow = recipe("s10_best").replace(width=4)
    images, path = tiny_images(16), tmp_path / "weights.safetensors"
    model = build(narrow, images)
    files.save_tensors(model.state_dict(), path, run.weights_metadata(narrow, images))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_weights(path)(x), model.eval()(x))


SMALL = Recipe(name="small")


def test_network_is_that_of_the_recipe_and_the_data():
    model = build(SMALL.replace(model="resnet9", fc_bias=False), tiny_images())
    assert type(model) is ResNet9 and model.fc.weight.shape == (3, 512) and model.fc.bias is None
    assert model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_first_weights_depend_on_the_seed_alone(small_network):
    first = build(SMALL, tiny_images(), seed=3)
    torch.manual_seed(99)
    assert_same_state(first, build(SMALL, tiny_images(), seed=3))
    assert not torch.equal(first.fc.weight, build(SMALL, tiny_images(), seed=4).fc.weight)


def test_logit_scale_is_a_factor_of_the_linear_layer(small_network):
    plain = build(SMALL, tiny_images())
    scaled = build(SMALL.replace(optimizer="sgd", logit_scale=0.125), tiny_images())
    assert torch.equal(scaled.fc.weight, plain.fc.weight / 8)
    assert torch.equal(scaled.prep[0].weight, plain.prep[0].weight)


def test_convolutions_of_a_recipe_with_dirac_pass_their_input_on():
    x = torch.randn(2, 64, 8, 8)
    outputs = build(SMALL.replace(dirac=True), tiny_images()).layer1.conv[0](x)
    torch.testing.assert_close(outputs[:, :64], x)


@pytest.mark.parametrize("count", [3000, 1999, 60])
def test_whitening_is_by_normalised_images_from_all_over_the_data(small_network, count):
    """They are sorted by class: those of the first are black here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[: 2 * count // 3] = 0
    images = replace(tiny_images(), train_images=images, train_labels=torch.zeros(count).long())
    model = build(SMALL.replace(whiten=True), images)
    inputs = Normalization(*images.statistics)(images.train_images)
    outputs = nn.functional.conv2d(inputs, model.prep[0].weight).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs.cov(), torch.eye(4), rtol=0, atol=0.1)


# Weights of a file


METADATA = {
    "recipe": "s10", "seed": 3, "model": "custom_resnet", "fc_bias": True,
    "classes": ["blue", "green", "red"],
    "mean": [0.5, 0.25, 0.125], "std": [0.1, 0.2, 0.30000000000000004], "data": "0123",
}


@pytest.fixture
def weights(tmp_path, small_network):
    """A file of untrained weights, and its network."""
    torch.manual_seed(0)
    model = Small(3)
    files.save_tensors(model.state_dict(), tmp_path / "weights", METADATA)
    return tmp_path / "weights", model


def test_file_is_the_network(weights):
    path, model = weights
    loaded = load_weights(path)
    assert type(loaded) is Small and not loaded.training
    assert loaded.prep[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_state(loaded, model)
    assert loaded.classes == ("blue", "green", "red")
    assert (loaded.mean, loaded.std) == ((0.5, 0.25, 0.125), (0.1, 0.2, 0.30000000000000004))
    assert loaded.metadata == METADATA
    assert loaded.size == (32, 32)


def test_file_tells_the_size_of_the_pictures(weights):
    path, model = weights
    files.save_tensors(model.state_dict(), path, {**METADATA, "size": [40, 36]})
    assert load_weights(path).size == (40, 36)


def test_half_precision_is_loaded_as_float32(weights):
    path, model = weights
    files.save_tensors(model.half().state_dict(), path, METADATA)
    loaded = load_weights(path)
    assert loaded.fc.weight.dtype == torch.float32
    assert_same_state(loaded, model.float())


def test_file_without_a_bias(weights):
    path, _ = weights
    model = Small(3, fc_bias=False)
    files.save_tensors(model.state_dict(), path, {**METADATA, "fc_bias": False})
    assert_same_state(load_weights(path), model)


def test_weights_that_come_with_the_repository(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "IMAGES", tmp_path)
    (tmp_path / "s12").mkdir()
    weights[0].rename(tmp_path / "s12" / "weights.safetensors")
    assert pretrained("s12").metadata == METADATA
    with pytest.raises(InputError, match="^no trained weights of 's10' .*: s12; load_weights .*$"):
        pretrained()


def test_what_the_linear_layer_sees(model):
    x = torch.randn(3, 3, 32, 32)
    seen = []
    with model.fc.register_forward_pre_hook(lambda fc, inputs: seen.append(*inputs)):
        model(x)
    assert torch.equal(model.embed(x), seen[0]) and seen[0].shape == (3, 512)


@pytest.mark.parametrize("changes", [
    {"classes": None}, {"mean": None}, {"mean": 0.5}, {"classes": "blue"},
    {"classes": ["blue", "red"]}, {"fc_bias": False}, {"model": "another"},
    {"size": 32}, {"size": [32]},
], ids=str)
def test_file_of_something_else(weights, changes):
    path, model = weights
    files.save_tensors(model.state_dict(), path, {**METADATA, **changes})
    with pytest.raises(InputError, match="weights does not hold a network of ours[^\n]*$"):
        load_weights(path)


@pytest.mark.parametrize("tensors", [
    {}, {"weight": torch.zeros(2)}, {"fc.bias": torch.zeros(4)}, {"prep.0.weight": None},
], ids=["none", "one more", "another shape", "one less"])
def test_other_tensors(weights, tensors):
    path, _ = weights
    tensors = {**load_file(path), **tensors} if tensors else {}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, {"run": json.dumps(METADATA)})
    with pytest.raises(InputError, match="weights does not hold a network of ours[^\n]*$"):
        load_weights(path)


@pytest.mark.parametrize("about", [None, {"run": "blue"}, {"run": "[]"}], ids=str)
def test_file_that_does_not_tell_of_its_run(weights, about):
    path, _ = weights
    save_file(load_file(path), path, about)
    with pytest.raises(InputError, match="weights (does not hold|is damaged)[^\n]*$"):
        load_weights(path)
