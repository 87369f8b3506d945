"""The named recipes and what can be done with one."""

import pytest
from pydantic import ValidationError

from utils import InputError
from utils.recipes import ABOUT_THE_SOURCE, RECIPES, Recipe, recipe

DEFAULTS = Recipe(name="mine")


def changed(name):
    """What the recipe sets, as plain values, and what its source reports."""
    settings = recipe(name)
    return settings.differences(DEFAULTS), settings.claimed


def test_s10_is_the_assignment():
    s10 = recipe("s10")
    settings = {"name": "s10", "optimizer": "adamw", "weight_decay": 0.2}
    assert changed("s10") == (settings, {"train": 98.60, "test": 93.07})
    assert (s10.epochs, s10.peak_epoch, s10.batch_size) == (24, 5, 512)
    assert (s10.padding, s10.flip, s10.cutout) == (4, 0.5, 8)
    assert (s10.min_lr, s10.max_lr, s10.final_lr, s10.anneal) == (1e-4, 1e-2, None, "linear")


def test_s10_20_has_the_rates_of_its_source():
    assert changed("s10_20") == (
        {
            "name": "s10_20", "epochs": 20, "optimizer": "adamw", "min_lr": 0.0017,
            "max_lr": 0.017, "weight_decay": 0.1,
        },
        {"train": 93.77, "test": 91.42},
    )


@pytest.mark.parametrize("name, published", [
    ("s10", {
        "max_lr": 5.21e-4, "min_lr": 5.21e-6, "final_lr": 5.21e-8, "peak_epoch": 4.8,
        "anneal": "cos", "cycle_momentum": True, "weight_decay": 0.01, "padding": 2,
        "padding_mode": "reflect", "cutout_share": 0.5,
    }),
    ("s10_20", {
        "max_lr": 0.017, "min_lr": 0.0017, "anneal": "cos", "cycle_momentum": True,
        "weight_decay": 1e-4, "padding": 2, "padding_mode": "reflect", "cutout_share": 0.5,
    }),
    ("resnet9", {
        "model": "resnet9", "epochs": 70, "peak_epoch": 21, "batch_size": 100, "min_lr": 4e-4,
        "final_lr": 4e-8, "anneal": "cos", "cycle_momentum": True, "weight_decay": 1e-4,
        "gradient_clip": 0.1, "padding_mode": "reflect", "cutout": 0,
    }),
    ("s10_albumentations", {
        "fc_bias": False, "per_image": True, "batch_size": 64, "max_lr": 0.0438,
        "min_lr": 4.38e-4, "final_lr": 4.38e-8, "peak_epoch": 4.8, "cycle_momentum": True,
        "weight_decay": 1e-3, "padding_mode": "reflect", "cutout_share": 0.5,
    }),
])
def test_published_recipes_are_what_their_sources_ran(name, published):
    """As far as there is a setting for it. Each is a recipe of its own."""
    source = recipe(f"{name}_published")
    assert source.differences(DEFAULTS) == {"name": f"{name}_published", **published}
    assert source == recipe(name).as_published() == source.as_published()
    assert source.claimed == recipe(name).claimed


def test_resnet9_is_its_source_but_for_length_and_batch():
    ours = recipe("resnet9")
    source = recipe("resnet9_published").replace(epochs=24, peak_epoch=7.2, batch_size=400)
    assert ours == source.replace(name="resnet9", original=ours.original)
    assert ours.claimed == {"test": 90.71}


def test_s12_is_s10_with_more_regularisation_under_lightning():
    s12 = {
        "name": "s12", "label_smoothing": 0.1, "rotation": 5.0, "brightness": 0.2, "held_out": 0.1,
    }
    assert recipe("s12").differences(recipe("s10")) == s12
    assert recipe("s12").loop == "lightning"


def test_s10_albumentations_has_the_rates_and_the_decay_of_s10():
    assert recipe("s10_albumentations").differences(recipe("s10")) == {
        "name": "s10_albumentations", "fc_bias": False, "per_image": True,
    }
    assert changed("s10_albumentations") == (
        {
            "name": "s10_albumentations", "fc_bias": False, "optimizer": "adamw",
            "weight_decay": 0.2, "per_image": True,
        },
        {"train": 69.45, "test": 69.80},
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_by_its_name_and_without_departures_is_as_published(name):
    assert recipe(name).name == name
    assert (recipe(name).as_published() == recipe(name)) == (not recipe(name).original)


def test_unknown_name_lists_the_names():
    with pytest.raises(InputError) as caught:
        recipe("s11")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in ["'s11'", *RECIPES])


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        recipe("s10").epochs = 1


# Other lengths and rates


@pytest.mark.parametrize("epochs, peak_epoch", [(12, 2.5), (48, 10), (1, 5 / 24)])
def test_scaled_moves_the_peak_along(epochs, peak_epoch):
    scaled = recipe("s10").scaled(epochs=epochs)
    assert scaled == recipe("s10").replace(epochs=epochs, peak_epoch=peak_epoch)


def test_scaled_by_default_changes_nothing():
    assert recipe("s10_20").scaled() == recipe("s10_20")
    assert recipe("s10").scaled(batch_size=40) == recipe("s10").replace(batch_size=40)


def test_scaled_takes_the_other_rates_along():
    settings = DEFAULTS.replace(min_lr=0.25, max_lr=1.0, final_lr=0.125)
    scaled = settings.scaled(max_lr=0.5)
    assert (scaled.min_lr, scaled.max_lr, scaled.final_lr) == (0.125, 0.5, 0.0625)
    assert recipe("s10").scaled(max_lr=0.5).final_lr is None


def test_sizes_take_turns():
    settings = DEFAULTS.replace(epochs=7, sizes=(16, 24, 32))
    assert [settings.size(epoch) for epoch in range(7)] == [16, 16, 16, 24, 24, 32, 32]
    assert recipe("s10").size(0) is None


# Settings that can't be


def refused(**settings):
    """What the one line says that refuses them."""
    with pytest.raises(InputError) as caught:
        DEFAULTS.replace(**settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name, value", [
    ("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("peak_epoch", -1), ("batch_size", 1),
    ("model", "resnet"), ("fc_bias", "maybe"), ("optimizer", "lamb"), ("optimizer", 3),
    ("min_lr", 0), ("max_lr", -0.1), ("max_lr", None), ("final_lr", 0), ("max_lr", float("nan")),
    ("anneal", "cosine"), ("label_smoothing", 2), ("weight_decay", -1), ("gradient_clip", -1),
    ("padding", -3), ("padding_mode", "edge"), ("flip", 7), ("flip", "often"), ("rotation", 181),
    ("brightness", 2), ("cutout", -1), ("cutout", 4.5), ("sizes", 16), ("logit_scale", 0),
    ("held_out", 1.5), ("loop", "foo"),
])
def test_wrong_value(name, value):
    message = refused(**{name: value})
    assert message.startswith(f"recipe setting {name} {value!r}: Input should be ")


@pytest.mark.parametrize("sizes", [(16, 4), (16, 16.5), (16, "a")])
def test_wrong_size_among_several(sizes):
    assert refused(sizes=sizes).startswith(f"recipe setting sizes {sizes[1]!r}: Input should be ")


def test_limits_are_in_the_line():
    start = "recipe setting"
    limit = "Input should be greater than or equal to 2"
    assert refused(batch_size=1) == f"{start} batch_size 1: {limit}"
    choices = "Input should be 'adam', 'adamw' or 'sgd'"
    assert refused(optimizer="lamb") == f"{start} optimizer 'lamb': {choices}"


def test_unknown_setting():
    assert refused(cutouts=4) == "recipe setting cutouts 4: Extra inputs are not permitted"


def test_a_recipe_needs_a_name():
    with pytest.raises(InputError, match="^recipe setting name .*: Field required$"):
        Recipe(epochs=3)


@pytest.mark.parametrize("epochs", [4, 5])
def test_peak_at_or_past_the_end(epochs):
    """As a recipe whose length alone is changed would have it."""
    assert refused(epochs=epochs) == (
        f"peak_epoch must lie before the end of the {epochs} epochs, not at 5"
    )
    assert DEFAULTS.replace(epochs=6).peak_epoch == 5


@pytest.mark.parametrize("name", ["min_lr", "final_lr"])
def test_the_highest_rate_is_the_highest(name):
    assert refused(**{name: 0.02}) == f"{name} must be at most max_lr, 0.01, not 0.02"
    assert DEFAULTS.replace(**{name: 0.01}).max_lr == 0.01


@pytest.mark.parametrize("settings, word", [
    ({"per_image": True, "sizes": (16, 32)}, "leave out sizes or per_image"),
    ({"per_image": True, "alternating_flip": True}, "leave out alternating_flip or per_image"),
    ({"per_image": True, "rotation": 5}, "leave out rotation or per_image"),
    ({"per_image": True, "brightness": 0.1}, "leave out brightness or per_image"),
    ({"logit_scale": 0.5}, "logit_scale needs optimizer sgd"),
])
def test_settings_that_do_not_go_together(settings, word):
    assert word in refused(**settings)
    for name in settings:
        DEFAULTS.replace(**{name: settings[name]}, optimizer="sgd")


# What a recipe says of itself


def test_printed_it_shows_its_name_and_what_differs_from_the_defaults():
    about = {"claimed": {"test": 90.0}, "original": {"flip": 0.1}}
    assert str(DEFAULTS.replace(flip=0.5, **about)) == "mine"
    printed = DEFAULTS.replace(epochs=7, peak_epoch=35 / 24, final_lr=4e-8, sizes=(8, 16))
    assert str(printed) == "mine, epochs 7, peak_epoch 1.45833, final_lr 4e-08, sizes [8, 16]"


def test_settings_hold_also_what_is_as_by_default():
    """Else a checkpoint from before a default was changed would pass for one of the new."""
    settings = DEFAULTS.settings()
    assert settings.keys() == Recipe.model_fields.keys() - ABOUT_THE_SOURCE
    assert settings["cutout"] == 8 and settings["final_lr"] is None and settings["sizes"] == []
    assert Recipe(**settings) == DEFAULTS
    about = DEFAULTS.replace(claimed={"test": 90.0}, original={"flip": 0.1})
    assert about.settings() == settings


def test_differences_are_what_the_other_has_otherwise():
    one = DEFAULTS.replace(cutout=0, max_lr=1 / 3, loop="lightning", sizes=(16, 32))
    assert one.differences(DEFAULTS) == {"cutout": 0, "max_lr": 0.333333, "sizes": [16, 32]}
    assert DEFAULTS.differences(one) == {"cutout": 8, "max_lr": 0.01, "sizes": []}
    assert one.differences(one.replace(loop="plain")) == {}


def test_rounding_of_a_rate_is_no_difference():
    assert DEFAULTS.replace(max_lr=0.01 + 1e-15).differences(DEFAULTS) == {}
    assert DEFAULTS.replace(max_lr=0.010001).differences(DEFAULTS) == {"max_lr": 0.010001}
