"""Progress bars: in notebooks and terminals; none where the output goes to a file.

The environment variable TQDM_DISABLE=1 turns them off everywhere.
"""

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


def progress_bar(*args, **settings):
    """A tqdm bar that vanishes when it is done."""
    if not issubclass(tqdm, tqdm_notebook):
        settings["disable"] = None  # tqdm's word for: unless this is a terminal
    return tqdm(*args, leave=False, **settings)
