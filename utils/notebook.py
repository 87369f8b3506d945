"""What both notebooks begin with: which data, how many epochs, which device, where to save.

The environment variable COURSE_DATA is read here and nowhere else: `cifar10` (the default) or a
folder for the real run, `sample` for a run of a minute on the built-in sample, as in the tests.
COURSE_RUNS names the folder for checkpoints, where `runs` is not to be it.
"""

import os
import tempfile
from pathlib import Path

from utils import data, devices
from utils.recipes import recipe

CPU_EPOCHS = 5
SAMPLE_EPOCHS = 1
_temporary = []  # folders that vanish with the notebook's process


def begin(name):
    """(recipe, images, device, dtype, folder) for the notebook of the recipe `name`.

    On a CPU the recipe is shortened to five epochs, on the sample to one; its peak stays at the
    same fraction. `folder` keeps the checkpoints, so that a run that was cut off can go on; for
    the sample it is a new temporary one.
    """
    source = os.environ.get("COURSE_DATA", "cifar10")
    images = data.load(source)
    device = devices.pick_device()
    settings = recipe(name)
    if source == "sample":
        settings = settings.scaled(epochs=SAMPLE_EPOCHS, batch_size=images.batch_size)
        _temporary.append(tempfile.TemporaryDirectory())
        folder = Path(_temporary[-1].name)
    else:
        if device.type == "cpu":
            settings = settings.scaled(epochs=CPU_EPOCHS)
        run = f"{name}-{Path(source).resolve().name}-{settings.epochs}-epochs"
        folder = Path(os.environ.get("COURSE_RUNS", "runs"), run)
    return settings, images, device, devices.amp_dtype(device), folder
