"""Progress bars: in notebooks and terminals; none where the output goes to a file.

Text bars, in notebooks too: notebooks with stored widgets often can't be shown on GitHub.
The environment variable TQDM_DISABLE=1 keeps them out of a notebook that is to be stored.
"""

import sys

from tqdm import tqdm


def progress_bar(*args, **settings):
    """A tqdm bar that vanishes when it is done."""
    if "ipykernel" not in sys.modules:
        settings.setdefault("disable", None)  # tqdm's word for: unless this is a terminal
    return tqdm(*args, leave=False, **settings)


def epoch_bar(images, epochs, *, done=0, **settings):
    """A bar over all images of a run, of whose epochs some are done."""
    return progress_bar(
        total=images * epochs, initial=images * done, unit=" images", smoothing=0.05, **settings
    )
