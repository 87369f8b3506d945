"""What both notebooks begin with: which data, which device, whether to train, where to save.

Environment variables are read here and nowhere else. COURSE_DATA: `cifar10` (the default) or a
folder for the real run, `sample` for a run of a minute on the built-in sample, as in the tests.
COURSE_TRAIN=1 trains without a GPU too, which takes hours. COURSE_RUNS names the folder for
checkpoints, where `runs` is not to be it.
"""

import os
import tempfile
from pathlib import Path

from utils import data, devices, files
from utils.recipes import recipe

CPU_EPOCHS = 5
SAMPLE_EPOCHS = 1
_temporary = []  # folders that vanish with the notebook's process


def begin(name):
    """(recipe, images, device, dtype, folder, train) for the notebook of the recipe `name`.

    `train`: whether to train, or else to take the recorded run of images/<name>: a CPU trains
    only where it is told to, or, for five epochs, where no weights are recorded. On the sample
    one epoch is trained. The peak stays at the same fraction. `folder` keeps the checkpoints, so
    that a run that was cut off can go on; for the sample it is a new temporary one.
    """
    devices.prepare()
    source = os.environ.get("COURSE_DATA", "cifar10")
    images = data.load(source)
    device = devices.pick_device()
    settings, dtype = recipe(name), devices.amp_dtype(device)
    if source == "sample":
        settings = settings.scaled(epochs=SAMPLE_EPOCHS, batch_size=images.batch_size)
        _temporary.append(tempfile.TemporaryDirectory())
        return settings, images, device, dtype, Path(_temporary[-1].name), True
    train = device.type != "cpu" or os.environ.get("COURSE_TRAIN") == "1"
    if not train and not (files.IMAGES / name / "weights.safetensors").exists():
        train, settings = True, settings.scaled(epochs=CPU_EPOCHS)
    run = f"{name}-{Path(source).resolve().name}-{settings.epochs}-epochs"
    folder = Path(os.environ.get("COURSE_RUNS", "runs"), run)
    return settings, images, device, dtype, folder, train
