"""What both notebooks begin with: which data, which device, whether to train, where to save.

Environment variables tell it. COURSE_DATA: `cifar10` (the default) or a folder for the real run,
`sample` for a run of a minute on the built-in sample, as in the tests. COURSE_RESIZE: the side to
which the pictures of that folder are brought, as by --resize. COURSE_TRAIN=1 trains without a GPU
too, which takes hours. COURSE_RUNS names the folder for runs, where `runs` is not to be it.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import torch

from utils import data, devices, files
from utils.recipes import recipe

CPU_EPOCHS = 5
SAMPLE_EPOCHS = 1
SAMPLE_WIDTH = 16
_temporary = tempfile.TemporaryDirectory()  # which vanishes with this process


def begin(name):
    """(recipe, images, device, dtype, train) for the notebook of the recipe `name`.

    `images`: with validation images where the recipe holds some out. `train`: whether to train, or
    else to take the recorded run of images/<name>. A CPU trains only where it is told to, or, for
    five epochs, where nothing is recorded for these images; a line says what was decided. On the
    sample a network of a quarter of the channels is trained for one epoch. The peak stays at the
    same fraction.
    """
    devices.prepare()
    source = os.environ.get("COURSE_DATA", "cifar10")
    resize = int(os.environ.get("COURSE_RESIZE") or 0) or None
    device = devices.pick_device()
    settings = recipe(name)
    dtype = devices.amp_dtype(device)
    images = data.load(source, resize=resize)
    images = data.with_validation(images, fraction=settings.held_out)
    if source == "sample":
        settings = settings.scaled(epochs=SAMPLE_EPOCHS, batch_size=images.batch_size)
        settings = settings.replace(width=SAMPLE_WIDTH)
        return settings, images, device, dtype, True
    train = device.type != "cpu" or os.environ.get("COURSE_TRAIN") == "1"
    if not train and is_recorded(name, images):
        print(f"No GPU: what takes hours is read from images/{name}; COURSE_TRAIN=1 trains here.")
        dtype = None  # so that the recorded weights give the same answers on all machines
    elif not train:
        print(f"No GPU, and no recorded run on these images: {CPU_EPOCHS} of {settings.epochs} "
              "epochs are trained; COURSE_TRAIN=1 trains all of them.")
        train = True
        settings = settings.scaled(epochs=CPU_EPOCHS)
    return settings, images, device, dtype, train


def is_recorded(name, images):
    """Whether images/<name> holds weights that were trained on the images of an `ImageData`.

    They are told by classes, size and mean: copies of CIFAR-10 differ in a few pixels.
    """
    path = files.IMAGES / name / "weights.safetensors"
    if not path.exists():
        return False
    _, about = files.read_tensors(path)
    same = torch.isclose(images.statistics[0], torch.tensor(about["mean"]).double(), atol=1e-4)
    kind = [about["classes"], about.get("size", [32, 32])]  # older files don't tell
    return kind == [list(images.classes), list(images.size)] and same.all().item()


def run_folder(recipe, images):
    """The folder for what a run of the recipe on an `ImageData` leaves.

    The same for the same settings and images, so that a run that was cut off goes on there, and
    another for others. For the sample it vanishes with this process.
    """
    source = os.environ.get("COURSE_DATA", "cifar10")
    runs = _temporary.name if source == "sample" else os.environ.get("COURSE_RUNS", "runs")
    identity = repr((recipe.settings(), images.fingerprint))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    run = f"{recipe.name}-{Path(source).resolve().name}-{recipe.epochs}-epochs-{digest}"
    return Path(runs).expanduser() / run
