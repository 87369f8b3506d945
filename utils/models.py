"""The custom ResNet of the assignment, the ResNet-9 of a tutorial, and how they are initialised."""

import torch
from torch import nn
from torch.nn import functional as F

from utils import InputError, files
from utils.data import Normalization


def _conv(channels_in, channels_out, *, pool=False):
    """Convolution 3×3, max-pool 2×2 if `pool`, BatchNorm, ReLU."""
    layers = [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(channels_out), nn.ReLU())


def _conv_with_bias(channels_in, channels_out, *, pool=False):
    """Convolution 3×3 with bias, BatchNorm, ReLU, and at last max-pool 2×2 if `pool`."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    pools = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(), *pools)


class ResidualLayer(nn.Module):
    """X = conv, max-pool, BN, ReLU; R = two conv-BN-ReLU of X; the layer gives X + R."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv = _conv(channels_in, channels_out, pool=True)
        self.residual = nn.Sequential(
            _conv(channels_out, channels_out), _conv(channels_out, channels_out)
        )

    def forward(self, x):
        x = self.conv(x)
        return x + self.residual(x)


class _Classifier(nn.Module):
    """From `features`, an eighth of the image's sides, to logits by `pool` and `fc`.

    Of images below 32×32 the last pool takes all that is left; larger ones are averaged over the
    places that are left after it. Raises InputError below 8×8.
    """

    def embed(self, x):
        """Images (N, 3, H, W) to what the linear layer sees, (N, 512) at full width."""
        if min(x.shape[-2:]) < 8:
            size = "×".join(map(str, x.shape[-2:]))
            raise InputError(f"images of {size} pixels are too small; enlarge them to 32×32")
        return self.pool(self.features(x)).mean(dim=(2, 3))

    def forward(self, x):
        return self.fc(self.embed(x))


class CustomResNet(_Classifier):
    """Images (N, 3, H, W), float, H and W at least 8, to logits (N, num_classes).

    6,573,130 parameters with ten classes; 6,573,120 without the bias of the linear layer. `width`:
    channels of the first convolution. Made for 32×32.
    Of smaller images the last pool takes all that is left; larger ones are averaged over the places
    that are left after it. Raises InputError below 8×8.
    """

    def __init__(self, num_classes=10, *, fc_bias=True, width=64):
        super().__init__()
        self.prep = _conv(3, width)
        self.layer1 = ResidualLayer(width, 2 * width)
        self.layer2 = _conv(2 * width, 4 * width, pool=True)
        self.layer3 = ResidualLayer(4 * width, 8 * width)
        self.pool = nn.MaxPool2d(4, ceil_mode=True)  # smaller pictures leave one place, too
        self.fc = nn.Linear(8 * width, num_classes, bias=fc_bias)

    def features(self, x):
        return self.layer3(self.layer2(self.layer1(self.prep(x))))


class ResNet9(_Classifier):
    """Images (N, 3, H, W), float, H and W at least 8, to logits (N, num_classes).

    6,575,370 parameters with ten classes; 6,575,360 without the bias of the linear layer. Its
    blocks pool after BatchNorm and ReLU, not before, and its convolutions have biases, although
    the BatchNorm that follows takes them out again. Other sizes than 32×32 are treated as by
    `CustomResNet`. Raises InputError below 8×8.
    Source: a tutorial for CIFAR-10 as a folder of images; its convolutions and their numbers of
    channels are those of Page, "How to train your ResNet" (2018).
    """

    def __init__(self, num_classes=10, *, fc_bias=True, width=64):
        super().__init__()
        two, four, eight = 2 * width, 4 * width, 8 * width
        self.conv1 = _conv_with_bias(3, width)
        self.conv2 = _conv_with_bias(width, two, pool=True)
        self.res1 = nn.Sequential(_conv_with_bias(two, two), _conv_with_bias(two, two))
        self.conv3 = _conv_with_bias(two, four, pool=True)
        self.conv4 = _conv_with_bias(four, eight, pool=True)
        self.res2 = nn.Sequential(_conv_with_bias(eight, eight), _conv_with_bias(eight, eight))
        self.pool = nn.MaxPool2d(4, ceil_mode=True)
        self.fc = nn.Linear(eight, num_classes, bias=fc_bias)

    def features(self, x):
        x = self.conv2(self.conv1(x))
        x = x + self.res1(x)
        x = self.conv4(self.conv3(x))
        return x + self.res2(x)


MODELS = {"custom_resnet": CustomResNet, "resnet9": ResNet9}
ARCHITECTURE = ("fc_bias", "width")  # settings of a recipe that its weights need


def build(recipe, images, *, seed=0):
    """The recipe's network for an `ImageData`, initialised by `seed`, on the CPU, channels_last."""
    torch.manual_seed(seed)
    settings = {name: getattr(recipe, name) for name in ARCHITECTURE}
    model = MODELS[recipe.model](len(images.classes), **settings)
    with torch.no_grad():
        model.fc.weight *= recipe.logit_scale
    if recipe.dirac:
        dirac_init(model)
    if recipe.whiten:
        # at most 1000, from all over them: in a folder they are sorted by class
        some = images.train_images[:: -(-len(images.train_images) // 1000)]
        whiten(model, Normalization(*images.statistics)(some))
    return model.to(memory_format=torch.channels_last)


def load_weights(path):
    """The network of a weights file that a run wrote: float32, channels_last, in eval mode.

    Its attributes `classes` (names), `mean` and `std` (of each channel, on the scale 0..1) and
    `size` (height, width) are those of its training images; `metadata` is all that the file says,
    a dict. Raises InputError where there is no such file, or it is damaged or of another kind.
    """
    tensors, metadata = files.read_tensors(path)
    try:
        classes, mean, std = (tuple(metadata[name]) for name in ("classes", "mean", "std"))
        height, width = map(int, metadata.get("size", (32, 32)))  # older files don't tell
        settings = {name: metadata[name] for name in ARCHITECTURE if name in metadata}
        model = MODELS[metadata["model"]](len(classes), **settings)
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} does not hold a network of ours with its classes, mean and std; "
            "name a file that python -m utils.train wrote"
        ) from error
    model.classes, model.mean, model.std, model.metadata = classes, mean, std, metadata
    model.size = height, width
    return model.to(memory_format=torch.channels_last).eval()


def pretrained(name="s10"):
    """The trained network of the recipe `name` that comes with the repository.

    As `load_weights` gives it. Raises InputError, with the names there are, for another.
    """
    folders = {path.parent.name: path for path in files.IMAGES.glob("*/weights.safetensors")}
    if name not in folders:
        there = ", ".join(sorted(folders)) or "none"
        raise InputError(
            f"no trained weights of {name!r} come with this copy, only: {there}; "
            "load_weights reads a file of your own"
        )
    return load_weights(folders[name])


@torch.no_grad()
def dirac_init(model):
    """Makes each convolution but the first pass its input on, in its first output channels.

    The other output channels keep their random weights. Source: Zagoruyko & Komodakis,
    "DiracNets" (2017); partly so in Jordan, "94% on CIFAR-10 in 3.29 Seconds" (2024).
    """
    _, *convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    for conv in convolutions:
        nn.init.dirac_(conv.weight[: conv.in_channels])


@torch.no_grad()
def whiten(model, images):
    """Makes the first convolution's outputs uncorrelated on `images`, but for the negated ones, the
    large ones of variance 1, and fixes it.

    `images`: float (N, 3, H, W), normalised as in training. The filters are the eigenvectors of
    their 3×3 patches' covariance, each over the root of its eigenvalue, and the same negated;
    output channels beyond these keep their random weights.
    Source: Page, "How to train your ResNet" (2018), part 8.
    """
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    patches = F.unfold(images, conv.kernel_size).transpose(1, 2).flatten(0, 1).double()
    variances, vectors = torch.linalg.eigh(patches.T.cov())
    filters = (vectors / (variances + 1e-2).sqrt()).T.flip(0).to(conv.weight)
    filters = torch.cat([filters, -filters])[: conv.out_channels]
    conv.weight[: len(filters)] = filters.view(-1, *conv.weight.shape[1:])
    conv.weight.requires_grad_(False)
