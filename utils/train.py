"""Train a recipe from the command line: `python -m utils.train s10 --data sample`."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import matplotlib.pyplot as plt
import tyro

from utils import InputError, data, recipes, run
from utils.recipes import RECIPES, Recipe

# All fields of a recipe as flags: the ones that are given by hand, and no others.
Given = TypedDict(
    "Given",
    {
        name: Annotated[
            field.annotation,
            tyro.conf.arg(help=field.description, help_behavior_hint="(default: the recipe's)"),
        ]
        for name, field in Recipe.model_fields.items()
        if name not in {"name", *recipes.ABOUT_THE_SOURCE}
    },
    total=False,
)


@dataclass(frozen=True, kw_only=True)
class Arguments(run.Options):
    """Trains a recipe and writes weights, history, metrics and figures to a folder."""

    recipe: tyro.conf.Positional[Literal[tuple(RECIPES)]]
    """what to train, see utils/recipes.py"""
    settings: tyro.conf.OmitArgPrefixes[Given]
    """other values for settings of the recipe"""
    as_published: bool = False
    """the source's settings also where the recipe departs from them"""

    def chosen(self, images=None):
        """The recipe that is asked for, on an `ImageData` that may want a schedule of its own.

        The peak moves with the length, and the other rates with the highest; a setting that is
        given by hand beats all of that.
        """
        recipe = recipes.recipe(self.recipe)
        recipe = recipe.as_published() if self.as_published else recipe
        own = {"epochs": images.epochs, "batch_size": images.batch_size} if images else {}
        scaling = {name: self.settings.get(name, own.get(name)) for name in
                   ("epochs", "batch_size", "max_lr")}
        return recipe.scaled(**scaling).replace(**self.settings)


def main(arguments=None):
    # Where torchrun, SLURM or Lightning start several processes, only the first one speaks.
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    first = next((os.environ[name] for name in names if name in os.environ), "0") == "0"
    stdout = sys.stdout if first else io.StringIO()
    hint = "; the same command with --resume goes on from the last whole epoch"
    with contextlib.redirect_stdout(stdout), as_command(first, hint=hint):
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.train")
        out = run.output_folder(args.chosen(), args)  # refused before pictures are read
        images = data.load(args.data)
        run.run(args.chosen(images), images, args, out)


@contextlib.contextmanager
def as_command(aloud=True, *, hint=""):
    """For a command: draws to files alone; InputError and Ctrl-C end it with one line, or none."""
    plt.switch_backend("Agg")  # no window, no display needed
    try:
        yield
    except InputError as error:
        sys.exit(f"error: {error}" if aloud else 1)
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted{hint}" if aloud else 1)


if __name__ == "__main__":
    main()
