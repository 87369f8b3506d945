"""The README's figures come from files, and its commands are the ones that are tested."""

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


RUNS = sorted((ROOT / "images").glob("*/metrics.json"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_results_are_those_of_the_files(path):
    metrics = json.loads(path.read_text(encoding="utf-8"))
    recipe, last = metrics["recipe"], metrics["last_epoch"]
    row = (
        f"| `{recipe['name']}` | {recipe['epochs']} | {last['train_acc']:.2f} | "
        f"{last['test_acc']:.2f} | {metrics['training_seconds'] / 60:.0f} min | "
        f"{metrics['device']}, {metrics['precision']} |"
    )
    assert row in README
    with open(path.with_name("history.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == recipe["epochs"]
    assert float(rows[-1]["test_acc"]) == last["test_acc"]


def test_continuous_integration_runs_the_test_command():
    command = "pip install -r requirements.txt && pytest --nbval"
    assert command in README
    assert command in (ROOT / ".ci/run").read_text().replace("-q ", "")


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets and not [t for t in targets if not (ROOT / t).exists()]
