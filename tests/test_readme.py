"""The README's figures come from files, and its commands are the ones that are tested."""

import re
from pathlib import Path

import pytest

from utils import record
from utils.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = sorted((ROOT / "images").glob("*/runs.csv"))


def test_tables_are_those_of_the_files():
    assert record.with_tables(README) == README


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_histories_end_as_the_runs(path):
    assert path.parent.name in RECIPES
    histories = set(path.parent.glob("history_seed*.csv"))
    for run in record.read_csv(path):
        assert run["recipe"] == path.parent.name
        history = path.with_name(f"history_seed{run['seed']}.csv")
        histories.remove(history)
        rows = record.read_csv(history)
        assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(int(run["epochs"]))]
        for name in ("train_acc", "train_loss", "test_acc", "test_loss"):
            assert rows[-1][name] == run[name]
    assert not histories


def test_continuous_integration_runs_the_test_command():
    command = "pip install -r requirements.txt && pytest --nbval"
    assert command in README
    assert command in (ROOT / ".ci/run").read_text().replace("-q ", "")


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets and not [t for t in targets if not (ROOT / t).exists()]
