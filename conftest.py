"""Under pytest the notebooks run on the built-in sample, unless COURSE_DATA says otherwise."""

import os

import matplotlib

os.environ.setdefault("COURSE_DATA", "sample")
os.environ.setdefault("TQDM_DISABLE", "1")
matplotlib.use("Agg")


def pytest_collectstart(collector):
    """nbval: warnings name paths and process numbers, which no two machines share."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
