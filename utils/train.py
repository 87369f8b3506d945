"""Train a recipe from the command line: `python -m utils.train s10 --data sample`."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

import matplotlib.pyplot as plt
import torch
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

    def chosen(self, images=None):
        """The recipe that is asked for, on an `ImageData` that may want a schedule of its own.

        The peak moves with the length, and the other rates with the highest; a setting that is
        given by hand beats all of that.
        """
        recipe = recipes.recipe(self.recipe)
        own = {"epochs": images.epochs, "batch_size": images.batch_size} if images else {}
        scaling = {name: self.settings.get(name, own.get(name)) for name in
                   ("epochs", "batch_size", "max_lr")}
        return recipe.scaled(**scaling).replace(**self.settings)


def main(arguments=None):
    hint = "; the same command with --resume goes on from the last whole epoch, where there is one"
    with as_command(hint=hint):
        args = tyro.cli(Arguments, args=arguments, prog="python -m utils.train")
        speaks = contextlib.nullcontext() if run.is_first_process(args) else _silence()
        # what the folder rules out is refused before pictures are read
        with speaks, run.output_folder(args.chosen(), args) as out:
            images = data.load(args.data, resize=args.resize)
            run.run(args.chosen(images), images, args, out)


@contextlib.contextmanager
def as_command(*, hint=""):
    """For a command: draws to files alone; what can't be done and Ctrl-C end it with one line.

    That is InputError, and OSError where something can't be written.
    """
    plt.switch_backend("Agg")  # no window, no display needed
    try:
        with contextlib.redirect_stdout(Output(sys.stdout or io.StringIO())):
            yield
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU has too little memory; try a smaller --batch-size, or --resize")
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted{hint}")


@contextlib.contextmanager
def _silence():
    """For a process that is not the first: it prints nothing and ends without a word."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (InputError, OSError, torch.OutOfMemoryError, KeyboardInterrupt):
        sys.exit(1)


class Output:
    """Standard output, at once, that stops no command: "?" stands for what its encoding lacks, and
    where nobody reads on (`… | head`) it goes nowhere.
    """

    def __init__(self, stream):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


if __name__ == "__main__":
    main()
