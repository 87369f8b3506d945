"""Named recipes: every setting of a training run in one frozen object.

`recipe("s10")` gives a recipe by name, and its method `replace` another with some settings changed.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from utils import InputError

Share = Annotated[float, Field(ge=0, le=1)]
ABOUT_THE_SOURCE = {"claimed", "original"}  # fields that no training depends on


class Recipe(BaseModel):
    """The settings of one training run. Rates are per optimizer step, accuracies in percent.

    The learning rate rises from `min_lr` to `max_lr`, reached at the end of epoch `peak_epoch`,
    and falls to `final_lr` at the last step. Each field, except the name and what is
    told of the source, is a flag of `utils.train`, and the text below it its help. A new field
    makes older checkpoints those of another recipe. Raises InputError, in one line, for settings
    that can't be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    model: Literal["custom_resnet", "resnet9"] = "custom_resnet"
    """the network"""
    fc_bias: bool = True
    """whether its linear layer has a bias"""
    width: PositiveInt = 64
    """channels of its first convolution; the later ones have 2, 4 and 8 times as many"""
    epochs: PositiveInt = 24
    """length of the run; the peak moves along"""
    peak_epoch: PositiveFloat = 5
    """the epoch at whose end the rate is highest; may be a fraction"""
    batch_size: Annotated[int, Field(ge=2)] = 512
    """images per step, of all processes together"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam's decay is in the gradient, adamw's decoupled; sgd has Nesterov momentum 0.9"""
    max_lr: PositiveFloat = 1e-2
    """highest learning rate; min_lr and final_lr keep their share of it"""
    min_lr: PositiveFloat = 1e-4
    """learning rate of the first step"""
    final_lr: PositiveFloat | None = None
    """learning rate of the last step; None: min_lr again"""
    anneal: Literal["linear", "cos"] = "linear"
    """form of the rise and fall: straight, or half a cosine wave each"""
    cycle_momentum: bool = False
    """momentum (Adam's first beta) from 0.95 down to 0.85 at the peak, and up again"""
    weight_decay: NonNegativeFloat = 0.0
    """decay of all parameters"""
    averaging: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the weights' running average that stays at each step; the average is what is
    evaluated and kept; 0: none"""
    label_smoothing: Share = 0.0
    """share of the target that is spread over all classes, in the training loss alone"""
    gradient_clip: PositiveFloat | None = None
    """largest absolute value of a gradient's element"""
    padding: NonNegativeInt = 4
    """pixels a side, before the random crop back to the image's size"""
    padding_mode: Literal["constant", "reflect"] = "constant"
    """black, or mirrored about the outermost pixels"""
    flip: Share = 0.5
    """probability of mirroring left to right"""
    alternating_flip: bool = False
    """draw once which images are mirrored, and mirror all of them in every other epoch"""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """degrees, at most, either way"""
    brightness: Share = 0.0
    """factors from 1 - brightness to 1 + brightness"""
    cutout: NonNegativeInt = 8
    """side of the square set to the data set's mean; 0 for none"""
    cutout_share: Share = 1.0
    """share of the images that get the square"""
    sizes: tuple[Annotated[int, Field(ge=8)], ...] = ()
    """sides of the training images, in turn; none: their own size"""
    logit_scale: PositiveFloat = 1.0
    """factor of the linear layer's first weights; its rate's by the square (sgd only)"""
    dirac: bool = False
    """initialise convolutions to pass their input on"""
    whiten: bool = False
    """have the first convolution whiten the training images, and leave it so"""
    per_image: bool = False
    """augment by albumentations image by image, instead of whole batches in torch"""
    held_out: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """share of the training images that is kept for validation, which only Lightning looks at"""
    loop: Literal["plain", "lightning"] = "plain"
    """our own loop, or PyTorch Lightning's"""
    claimed: dict[str, float] = {}
    """what the source reports, e.g. {"test": 93.07}"""
    original: dict[str, Any] = {}
    """the source's settings where ours are others"""

    def __init__(self, **settings):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            setting = f"{first['loc'][0]} {first['input']!r}"
            raise InputError(f"recipe setting {setting}: {first['msg']}") from None
        if self.peak_epoch >= self.epochs:
            end = f"before the end of the {self.epochs} epochs"
            raise InputError(f"peak_epoch must lie {end}, not at {self.peak_epoch:g}")
        for name in ("min_lr", "final_lr"):
            rate = getattr(self, name)
            if rate and rate > self.max_lr:
                raise InputError(f"{name} must be at most max_lr, {self.max_lr:g}, not {rate:g}")
        for name in ("sizes", "alternating_flip", "rotation", "brightness"):
            if self.per_image and getattr(self, name):
                raise InputError(f"{name} needs whole batches; leave out {name} or per_image")
        if self.logit_scale != 1 and self.optimizer != "sgd":
            raise InputError("logit_scale needs optimizer sgd; Adam's steps don't scale with it")

    def __str__(self):
        """The name, and what differs from the defaults, on one line."""
        changed = self.differences(Recipe(name=self.name))
        return ", ".join([self.name, *(f"{name} {value}" for name, value in changed.items())])

    def replace(self, **changes):
        """The same recipe with other settings."""
        return Recipe(**{**dict(self), **changes})

    def settings(self):
        """All settings that a training depends on, as plain values: what one run agrees in."""
        return self.model_dump(mode="json", exclude=ABOUT_THE_SOURCE)

    def differences(self, other):
        """The settings that `other` has otherwise, as plain values with six digits.

        `loop` does not count: both loops train the same.
        """
        ours, theirs = (_rounded(recipe.settings()) for recipe in (self, other))
        return {
            name: ours[name] for name in ours if name != "loop" and ours[name] != theirs[name]
        }

    def as_published(self):
        """The recipe with its source's settings also where ours depart, as one of its own."""
        name = f"{self.name}_published"
        return self.replace(**self.original, name=name, original={}) if self.original else self

    def size(self, epoch):
        """The side of the training images in `epoch`, from 0; None for their own size.

        `sizes` are shared out evenly: three of them take a third of the epochs each.
        """
        return self.sizes[epoch * len(self.sizes) // self.epochs] if self.sizes else None

    def scaled(self, *, epochs=None, batch_size=None, max_lr=None):
        """The same recipe with another length, batch size or highest rate.

        The peak stays at the same fraction of the run, and the other rates at the same share of
        `max_lr`.
        """
        epochs = self.epochs if epochs is None else epochs
        max_lr = self.max_lr if max_lr is None else max_lr
        factor = max_lr / self.max_lr
        return self.replace(
            epochs=epochs,
            peak_epoch=self.peak_epoch * epochs / self.epochs,
            batch_size=self.batch_size if batch_size is None else batch_size,
            min_lr=self.min_lr * factor,
            max_lr=max_lr,
            final_lr=self.final_lr and self.final_lr * factor,
        )


def _rounded(settings):
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in settings.items()}


_RECIPES = [
    # The assignment. Its rates are left to an LR finder; ours are read off the curve in
    # S10_custom_resnet.ipynb. "No annihilation": the schedule ends where it began. Adam with
    # decoupled decay, because it seems to overfit more without: images/s10/README.md. The source,
    # github.com/jaiyesh/tsai-era (folder S10), has L2 decay and a rate 20 times smaller, which
    # falls to nearly nothing; it fills cutout with the mean's number after normalisation, which is
    # left out here.
    Recipe(
        name="s10",
        optimizer="adamw",
        weight_decay=0.2,
        claimed={"train": 98.60, "test": 93.07},
        original={
            "optimizer": "adam", "weight_decay": 1e-2, "max_lr": 5.21e-4, "min_lr": 5.21e-6,
            "final_lr": 5.21e-8, "peak_epoch": 4.8, "anneal": "cos", "cycle_momentum": True,
            "padding": 2, "padding_mode": "reflect", "cutout_share": 0.5,
        },
    ),
    # The same in 20 epochs, with the rates that its source reports. Decoupled decay as in s10: what
    # it takes from a weight in a step, rate times decay, is at the peak about the same. The claims
    # are of epoch 24: the source's README says 20, its notebook ran 24; its epoch 20 has 90.35 and
    # 89.73. github.com/gharshit/ERA_V2 (folder S10_Assignment), with decay, crop and dropout in
    # github.com/gharshit/ERA_MasterCodes at b73b58a; the dropout of 0.07 is left out.
    Recipe(
        name="s10_20",
        epochs=20,
        optimizer="adamw",
        min_lr=0.0017,
        max_lr=0.017,
        weight_decay=0.1,
        claimed={"train": 93.77, "test": 91.42},
        original={
            "epochs": 24, "optimizer": "adam", "weight_decay": 1e-4, "anneal": "cos",
            "cycle_momentum": True, "padding": 2, "padding_mode": "reflect", "cutout_share": 0.5,
        },
    ),
    # The same network without a GPU, over 90 % on two cores in about half an hour where they have
    # bfloat16 instructions. Small images first, as in fast.ai's entry to DAWNBench (2018): one of
    # 16×16 costs a quarter of the work. Nesterov momentum, its rate and decay, and logits times
    # 1/8 from Page, "How to train your ResNet" (2018). images/s10_cpu/tuning.csv holds what was
    # tried.
    Recipe(
        name="s10_cpu",
        epochs=10,
        peak_epoch=3,
        batch_size=256,
        optimizer="sgd",
        min_lr=0.004,
        max_lr=0.4,
        weight_decay=5e-4,
        label_smoothing=0.1,
        sizes=(16, 16, 16, 16, 24, 24, 24, 32, 32, 32),
        logit_scale=0.125,
        dirac=True,
        whiten=True,
    ),
    # As far as this network goes in 24 epochs, rung by rung in images/s10_best/README.md. Most is
    # from Page, "How to train your ResNet" (2018-2019), part 8; alternating flip from Jordan, "94%
    # on CIFAR-10 in 3.29 Seconds" (2024), as is dirac as an initialisation, which goes back to
    # Zagoruyko & Komodakis, "DiracNets" (2017).
    Recipe(
        name="s10_best",
        optimizer="sgd",
        min_lr=0.008,
        max_lr=0.8,
        final_lr=0.08,
        weight_decay=5e-4,
        label_smoothing=0.2,
        logit_scale=0.125,
        whiten=True,
        dirac=True,
        averaging=0.99,
        alternating_flip=True,
        padding_mode="reflect",
    ),
    # Under PyTorch Lightning, with more augmentation and regularisation. AdamW with the decay of
    # s10, so that the two differ in augmentation, smoothing and the held-out images alone. Its
    # decay is decoupled: in the gradient (L2) Adam would divide it by each weight's own gradient
    # scale (Loshchilov & Hutter 2019). At the peak a weight that no gradient renews falls to 1/e
    # within 1 / (0.01 · 0.2) = 500 steps, less than six epochs. The project that this answers,
    # github.com/Paurnima-Chavan/cifar-s12, shows log and curves as pictures in its README.
    Recipe(
        name="s12",
        optimizer="adamw",
        weight_decay=0.2,
        label_smoothing=0.1,
        rotation=5,
        brightness=0.2,
        held_out=0.1,
        loop="lightning",
    ),
    # A tutorial for CIFAR-10 as a folder of images: network, augmentation, Adam, peak rate, decay
    # and clipping are its own, and the rest of its one-cycle are PyTorch's defaults: 30 % warm-up
    # in cosines, from 0.01 / 25, to a 10,000th of that, momentum cycling. We depart in length and
    # batch: it ran 70 epochs of 100, on top of weights that already had 79.43 %. Its 90.71 is the
    # last epoch's. github.com/SrivaniJayanthi/Pytorch-Resnet9-CIFAR10.
    Recipe(
        name="resnet9",
        model="resnet9",
        peak_epoch=7.2,
        batch_size=400,
        min_lr=0.01 / 25,
        final_lr=0.01 / 25 / 1e4,
        anneal="cos",
        cycle_momentum=True,
        weight_decay=1e-4,
        gradient_clip=0.1,
        padding_mode="reflect",
        cutout=0,
        claimed={"test": 90.71},
        original={"epochs": 70, "peak_epoch": 21.0, "batch_size": 100},
    ),
    # The assignment with albumentations, image by image, and without the last bias; optimizer and
    # decay as in s10. Its source aimed at over 90. It took batches of 64 at a rate of 0.044 with L2
    # decay in the gradient, which Adam divides by each weight's own gradient scale (see s12). The
    # claims are those of its best run. github.com/padmanabh275/S10_Resnet; its padding by
    # replication is left out.
    Recipe(
        name="s10_albumentations",
        fc_bias=False,
        optimizer="adamw",
        weight_decay=0.2,
        per_image=True,
        claimed={"train": 69.45, "test": 69.80},
        original={
            "batch_size": 64, "optimizer": "adam", "weight_decay": 1e-3, "max_lr": 4.38e-2,
            "min_lr": 4.38e-4, "final_lr": 4.38e-8, "peak_epoch": 4.8, "cycle_momentum": True,
            "padding_mode": "reflect", "cutout_share": 0.5,
        },
    ),
]
RECIPES = {r.name: r for r in _RECIPES}
RECIPES |= {r.name: r for r in (r.as_published() for r in _RECIPES if r.original)}


def recipe(name):
    """The recipe of that name. Raises InputError, with the names there are, for another."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
