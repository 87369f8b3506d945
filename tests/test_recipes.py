"""The named recipes and what can be done with one."""

import dataclasses

import pytest

from utils import InputError
from utils.recipes import RECIPES, Recipe, recipe


def test_s10_is_the_assignment():
    s10 = recipe("s10")
    assert (s10.epochs, s10.peak_epoch, s10.batch_size) == (24, 5, 512)
    assert (s10.optimizer, s10.padding, s10.flip, s10.cutout) == ("adam", 4, 0.5, 8)
    assert s10.min_lr < s10.max_lr
    assert dict(s10.claimed) == {"train": 98.60, "test": 93.07}


def test_s10_20_has_the_rates_of_its_source():
    s10_20 = recipe("s10_20")
    assert (s10_20.epochs, s10_20.peak_epoch, s10_20.batch_size) == (20, 5, 512)
    assert (s10_20.min_lr, s10_20.max_lr) == (0.0017, 0.017)
    assert dict(s10_20.claimed) == {"train": 93.77, "test": 91.42}


def test_resnet9_is_its_source_but_for_the_length():
    ours, source = recipe("resnet9"), recipe("resnet9").as_published()
    assert source.identity() == {
        "name": "resnet9", "model": "resnet9", "epochs": 8, "peak_epoch": 2.4, "batch_size": 400,
        "min_lr": 0.0004, "final_lr": pytest.approx(4e-8), "anneal": "cos",
        "cycle_momentum": True, "weight_decay": 1e-4, "gradient_clip": 0.1,
        "padding_mode": "reflect", "cutout": 0,
    }
    assert (source.optimizer, source.max_lr) == ("adam", 0.01)
    assert ours == dataclasses.replace(source, epochs=24, peak_epoch=7.2)
    assert dict(ours.claimed) == {"test": 90}


def test_s10_albumentations_departs_in_rates_and_decay():
    ours = recipe("s10_albumentations")
    assert ours.identity() == {
        "name": "s10_albumentations", "fc_bias": False, "per_image": True
    }
    assert ours.as_published() == dataclasses.replace(
        ours, min_lr=0.003, max_lr=0.03, weight_decay=1e-3
    )
    assert dict(ours.claimed) == {"test": 69.80}


def test_published_recipes_scale_and_change_like_others():
    source = recipe("s10_albumentations").as_published().changed(["cutout=0"]).scaled(max_lr=0.3)
    assert (source.min_lr, source.max_lr, source.cutout) == (pytest.approx(0.03), 0.3, 0)
    assert recipe("resnet9").as_published().scaled(epochs=4).peak_epoch == 1.2


@pytest.mark.parametrize("name", ["s10", "s10_20", "s12"])
def test_a_recipe_without_departures_is_as_published(name):
    assert recipe(name).as_published() == recipe(name)


def test_every_recipe_goes_by_its_own_name():
    assert all(recipe(name).name == name for name in RECIPES)


def test_unknown_name_lists_the_names():
    with pytest.raises(InputError) as caught:
        recipe("s11")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ["'s11'", *RECIPES])


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("s10").epochs = 1


@pytest.mark.parametrize("epochs, peak_epoch", [(12, 2.5), (48, 10), (1, 5 / 24)])
def test_scaled_moves_the_peak_along(epochs, peak_epoch):
    scaled = recipe("s10").scaled(epochs=epochs)
    assert scaled == dataclasses.replace(recipe("s10"), epochs=epochs, peak_epoch=peak_epoch)


def test_scaled_by_default_changes_nothing():
    assert recipe("s10_20").scaled() == recipe("s10_20")
    assert recipe("s10").scaled(batch_size=40) == dataclasses.replace(recipe("s10"), batch_size=40)


def test_scaled_takes_the_other_rates_along():
    settings = Recipe(name="mine", min_lr=0.25, max_lr=1.0, final_lr=0.125)
    scaled = settings.scaled(max_lr=0.5)
    assert (scaled.min_lr, scaled.max_lr, scaled.final_lr) == (0.125, 0.5, 0.0625)
    assert recipe("s10").scaled(max_lr=0.5).final_lr is None


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"epochs": -1}, {"batch_size": 1}])
def test_too_small(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(InputError, match=f"{name} .* not {value}"):
        recipe("s10").scaled(**settings)


@pytest.mark.parametrize("assignment, message", [
    ("optimizer=lamb", "optimizer must be one of adam, adamw, sgd, not 'lamb'"),
    ("padding_mode=edge", "padding_mode must be one of constant, reflect, not 'edge'"),
    ("anneal=cosine", "anneal must be one of linear, cos, not 'cosine'"),
    ("min_lr=0", "min_lr must be positive, not 0.0"),
    ("max_lr=-0.1", "max_lr must be positive, not -0.1"),
    ("final_lr=0", "final_lr must be positive, not 0.0"),
    ("per_image=True", "sizes need whole batches; choose sizes=() or per_image=False"),
])
def test_settings_that_do_not_exist_or_do_not_go_together(assignment, message):
    with pytest.raises(InputError) as caught:
        recipe("s10").changed(["sizes=(16, 32)", assignment])
    assert str(caught.value) == message


def test_identity_is_what_differs_from_the_defaults():
    half = recipe("s10").scaled(epochs=12).identity()
    assert half == {"name": "s10", "epochs": 12, "peak_epoch": 2.5}
    about = {"claimed": (("test", 90.0),), "original": (("flip", 0.1),)}
    assert Recipe(name="mine", flip=0.5, **about).identity() == {"name": "mine"}
    assert str(Recipe(name="mine", **about)) == str(Recipe(name="mine"))


def test_printed_it_shows_every_setting():
    text = str(recipe("s10").scaled(epochs=7))
    assert all(
        setting in text
        for setting in ["name s10", "epochs 7", "peak_epoch 1.4583", "batch_size 512", "cutout 8"]
    )
    assert "\n" not in text and "None" not in text
    assert "final_lr 4e-08" in str(Recipe(name="mine", final_lr=4e-8))


def test_sizes_take_turns():
    settings = Recipe(name="mine", epochs=7, sizes=(16, 24, 32))
    assert [settings.size(epoch) for epoch in range(7)] == [16, 16, 16, 24, 24, 32, 32]
    assert recipe("s10").size(0) is None


def test_changed():
    changed = recipe("s10").changed(
        ["max_lr=1", "cutout=0", "flip=0.25", "dirac=True", "optimizer=sgd", "sizes=(16, 32)",
         "gradient_clip=0.1"]
    )
    assert changed == dataclasses.replace(
        recipe("s10"), max_lr=1.0, cutout=0, flip=0.25, dirac=True, optimizer="sgd",
        sizes=(16, 32), gradient_clip=0.1,
    )
    assert type(changed.max_lr) is float


@pytest.mark.parametrize("assignment, word", [
    ("cutouts=4", "cutouts"), ("name=mine", "name"), ("original=()", "no setting"),
    ("claimed=()", "no setting"), ("cutout=4.5", "4.5"), ("cutout=", "cutout"),
    ("flip=often", "often"), ("optimizer=3", "optimizer"), ("sizes=16", "sizes"), ("", "setting"),
])
def test_changed_in_vain(assignment, word):
    with pytest.raises(InputError, match=word):
        recipe("s10").changed([assignment])


@pytest.mark.parametrize("assignment", [
    "cutout=-1", "padding=-3", "label_smoothing=2", "weight_decay=-1", "flip=7", "brightness=2",
    "held_out=1.5", "loop=foo", "sizes=(16.5,)", "sizes=('a',)", "sizes=(0,)", "logit_scale=0",
    "gradient_clip=-1", "peak_epoch=-1", "logit_scale=0.5",
])
def test_settings_that_can_not_be(assignment):
    with pytest.raises(InputError, match=assignment.partition("=")[0]):
        recipe("s10").changed([assignment])
