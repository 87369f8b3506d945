"""The README's figures come from files; its commands, and the notebooks', are those there are."""

import importlib
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import tyro

from utils import files, run
from utils.maintenance import tables
from utils.recipes import RECIPES

ROOT = tables.ROOT
README = tables.README.read_text(encoding="utf-8")
RUNS = sorted(tables.IMAGES.glob("*/runs.csv"))
PROSE = "\n".join([README, *(
    cell.source for path in sorted(ROOT.glob("*.ipynb"))
    for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
)])
CODE = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", PROSE, re.DOTALL | re.MULTILINE))
COMMANDS = sorted(set(re.findall(r"-m (utils\b[^`\n]*)", CODE.replace("\\\n", ""))))


def test_tables_are_those_of_the_files():
    assert tables.with_tables(README) == README


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_histories_end_as_the_runs(path):
    assert path.parent.name in RECIPES
    runs = files.read_table(path)
    assert set(runs["recipe"]) == {path.parent.name}
    histories = {
        seed: files.read_table(path.with_name(f"history_seed{seed}.csv")) for seed in runs["seed"]
    }
    assert len(histories) == len(runs) == len(list(path.parent.glob("history_seed*.csv")))
    for one in runs.to_dict("records"):
        history = histories[one["seed"]]
        assert list(history["epoch"]) == list(range(1, one["epochs"] + 1))
        for name in ("train_acc", "train_loss", "test_acc", "test_loss"):
            assert history[name].iloc[-1] == one[name]


def test_continuous_integration_runs_the_two_commands():
    section = README.partition("## Two commands\n")[2].partition("\n## ")[0]
    first, second = re.findall(r"^```bash\n(.*)\n```", section, re.MULTILINE)
    steps = {*first.split(" && "), *second.split(" && ")}
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("install -q", "install")
    assert steps <= set(re.split(r"\n| && ", script))
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert steps <= set(re.findall(r"- run: (.*)", workflow))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *given = shlex.split(command)
    module = importlib.import_module(name)
    if not hasattr(module, "Arguments"):
        assert not given
    elif "--help" not in given:
        arguments = tyro.cli(module.Arguments, args=given)
        if isinstance(arguments, run.Options):
            run.output_folder(arguments.chosen(), arguments)


def test_files_that_it_names():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    names = re.findall(r"`((?:utils|tests)/[\w./]*)`", README)
    assert links and names
    assert not [name for name in links + names if not Path(ROOT, name).exists()]
