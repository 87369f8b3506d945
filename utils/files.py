"""Files of a run, each writer beside its reader: tables, checkpoints, weights."""

import functools
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from utils import InputError

IMAGES = Path(__file__).parents[1] / "images"  # recorded runs, a folder for each recipe
CHECKPOINTS = {"plain": "checkpoint.pt", "lightning": "last.ckpt"}


@contextmanager
def writing(path):
    """Raises InputError where the block can't write: no permission, a full disk, a long name."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} can't be written ({error.strerror}); make room, or name another folder"
        ) from error


@contextmanager
def whole_file(path):
    """A path to write to; it takes the place of `path` only when the block ends well.

    Raises InputError where it can't be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def save_bytes(content, path):
    with whole_file(path) as part:
        part.write_bytes(content)


def save_text(text, path):
    """As UTF-8, with the same line ends on all platforms."""
    save_bytes(text.encode(), path)


def save_table(rows, path):
    """A DataFrame, or dicts with the same keys, as CSV, with all digits."""
    save_text(pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"), path)


def read_table(path):
    """A DataFrame. Empty fields, versions, commits and fingerprints are texts."""
    texts = dict.fromkeys(("python", "torch", "torchvision", "commit", "data"), str)
    read = functools.partial(pd.read_csv, path, dtype=texts, keep_default_na=False)
    # again with Python's float, because pandas before 3 does not read to the last digit
    return read(converters=dict.fromkeys(read().select_dtypes("float"), float))


def save_figure(figure, path):
    """As PNG; the figure is closed."""
    with whole_file(path) as part:
        figure.savefig(part, format="png", bbox_inches="tight")
    plt.close(figure)


def read_metrics(out):
    """What the finished run in the folder `out` says of itself. Raises InputError if it can't."""
    try:
        return json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"no finished run in {out}; train it with utils.train first") from error


def save_checkpoint(path, identity, history, parts):
    """`identity`: a dict of plain values; `parts`: objects with a `state_dict`, by name."""
    state = {name: part.state_dict() for name, part in parts.items()}
    save_objects({"identity": identity, "history": list(history), **state}, path)


def save_objects(objects, path):
    """By torch.save, which itself would leave half a file on a full disk and not say why."""
    content = io.BytesIO()
    torch.save(objects, content)
    # a view (getbuffer) that an error holds can crash Python 3.12 when it is collected
    save_bytes(content.getvalue(), path)


def read_checkpoint(path, identity=None, *, device="cpu"):
    """What `path` holds, a dict. Raises InputError where it is damaged or of another run.

    It is of another run where a value of `identity`, if that is given, differs from its own.
    """
    try:
        # weights_only: a file from elsewhere must not run code
        saved = torch.load(path, map_location=device, weights_only=True)
        wanted = identity or saved["identity"]
        differing = [key for key in wanted if saved["identity"].get(key) != wanted[key]]
    except Exception as error:  # a damaged file raises a dozen kinds, from OSError to UnicodeError
        raise InputError(
            f"the checkpoint {path} can't be read ({type(error).__name__}); try again, or if it is "
            "damaged, or none of ours, delete it to start anew"
        ) from error
    if differing:
        raise InputError(
            f"the checkpoint {path} belongs to another run (its {' and '.join(differing)} "
            "differs); give the settings that it began with, or another folder (--out)"
        )
    return saved


def restore_checkpoint(path, identity, parts, *, device):
    """Puts the saved states into `parts`. Returns the history's rows."""
    saved = read_checkpoint(path, identity, device=device)
    for name, part in parts.items():
        if saved[name]:  # a scaler that was not in use is empty
            part.load_state_dict(saved[name])
    return saved["history"]


def save_tensors(tensors, path, metadata=None):
    """A dict of tensors as safetensors, for `read_tensors`, such as the weights of a network.

    `metadata`: a dict of plain values, kept in the file's header. The same tensors and metadata
    give the same bytes.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One entry, because safetensors writes several in an order that changes from file to file.
    about = {"run": json.dumps(metadata or {}, sort_keys=True)}
    save_bytes(save(tensors, about), path)  # save_file would keep it from all other users


def read_tensors(path):
    """({name: tensor}, metadata) of a file by `save_tensors`. No code of the file is run.

    Raises InputError where there is no such file or it is damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"no weights file {path}; name the weights.safetensors of a run")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {}).get("run", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or no safetensors file; copy it again, or train anew"
        ) from error
