"""The pages' figures come from files; their commands, and the notebooks', are those there are."""

import ast
import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import tyro
from PIL import Image

from utils import data, evaluate, files, run
from utils.maintenance import tables
from utils.recipes import RECIPES

ROOT = tables.ROOT
IMAGES = tables.IMAGES
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *IMAGES.rglob("*.md")])
}
README = PAGES["README.md"]
RUNS = sorted(IMAGES.rglob("runs.csv"))
PROSE = "\n".join([*PAGES.values(), *(
    cell.source for path in sorted(ROOT.glob("*.ipynb"))
    for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
)])
CODE = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", PROSE, re.DOTALL | re.MULTILINE))
COMMANDS = sorted(set(re.findall(r"-m (utils\b[^`\n]*)", CODE.replace("\\\n", ""))))


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_files(page):
    assert tables.with_tables(PAGES[page], tables.PAGES[page]) == PAGES[page]


def test_no_page_has_a_table_that_nobody_writes():
    marks = {page: re.findall(r"<!-- end of (.*) -->", text) for page, text in PAGES.items()}
    written = {page: list(tables.PAGES.get(page, {})) for page in PAGES}
    assert marks == written


def test_all_recipes_and_all_recorded_runs_are_listed():
    listed = set(files.read_table(IMAGES / "recipes.csv")["folder"])
    assert listed >= {path.parent.relative_to(IMAGES).as_posix() for path in RUNS}
    own = {name for name in RECIPES if not name.endswith("_published")}
    assert {name.partition("/")[0] for name in listed} == own


def test_the_sources_claim_what_their_notebooks_print_last():
    """But for s10_albumentations, whose claim is that of its better run."""
    last = files.read_table(IMAGES / "published.csv").groupby("recipe").last()
    for name in ("s10", "s10_20", "resnet9"):
        claims = RECIPES[name].claimed
        assert {split: float(last.loc[name, f"{split}_acc"]) for split in claims} == claims
    assert float(last.loc["s10_albumentations", "test_acc"]) == 68.83


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.relative_to(IMAGES).as_posix())
def test_histories_end_as_the_runs(path):
    runs = files.read_table(path)
    assert set(runs["recipe"]) == {path.relative_to(IMAGES).parts[0]}
    histories = {
        seed: files.read_table(path.with_name(f"history_seed{seed}.csv")) for seed in runs["seed"]
    }
    assert len(histories) == len(runs) == len(list(path.parent.glob("history_seed*.csv")))
    for one in runs.to_dict("records"):
        history = histories[one["seed"]]
        assert list(history["epoch"]) == list(range(1, one["epochs"] + 1))
        for name in ("train_acc", "train_loss", "test_acc", "test_loss"):
            assert history[name].iloc[-1] == one[name]


def test_continuous_integration_runs_the_quick_start():
    section = README.partition("## Quick start\n")[2].partition("\n## ")[0]
    steps = set(re.findall(r"^```bash\n(.*)\n```", section, re.MULTILINE))
    assert len(steps) == 3  # with the installation
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("install -q", "install")
    assert steps <= set(re.split(r"\n| && ", script))
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert steps <= set(re.findall(r"- run: (.*)", workflow))


def test_the_commands_of_the_pages_are_found():
    assert {"utils.train s10", "utils.evaluate picture.jpg", "utils.demo"} <= set(COMMANDS)


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
            with run.output_folder(arguments.chosen(), arguments):
                pass


def python_of(page):
    (source,) = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    return source


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "teal").save("picture.jpg")
    names = {}
    exec(python_of("README.md"), names)
    assert names["model"].metadata["recipe"] == "s10"
    shares = ast.literal_eval(capsys.readouterr().out)
    assert list(shares) == list(names["model"].classes)
    evaluate.main(["picture.jpg", "--precision", "fp32"])
    printed = capsys.readouterr().out
    assert "s10, seed 0" in printed and f"{max(shares, key=shares.get)} " in printed


def test_the_range_test_is_made_by_the_python_of_its_page(tmp_path, monkeypatch, small_network):
    """On the sample, by a small network and few images a step: at the rates of the recorded one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "s10", RECIPES["s10"].replace(batch_size=16))
    monkeypatch.setattr(data, "load", partial(data.load, "sample"))
    exec(python_of("images/s10/README.md"), {})
    made, recorded = (files.read_table(Path(folder, "s10/range_test.csv"))
                      for folder in (tmp_path / "images", IMAGES))
    length = min(len(made), len(recorded))
    assert length > 30
    assert np.allclose(made["lr"][:length], recorded["lr"][:length])


def known_figures():
    """All accuracies and losses of recorded runs and of the sources, as pages print them."""
    measured = [
        files.read_table(path).filter(regex="_acc|_loss").to_numpy().flatten()
        for path in IMAGES.rglob("*.csv") if path.name != "metrics.csv"
    ]
    claims = [claim for each in RECIPES.values() for claim in each.claimed.values()]
    values = pd.to_numeric(np.concatenate([*measured, claims, tables.rungs()["mean"]]), "coerce")
    return {f"{value:.2f}" for value in values} | {f"{value:.3f}" for value in values}


# What others state of their own work: Page's baseline and last network, each without and with flip;
# weights that resnet9's source began with, and the third run of s10_albumentations' source.
CITED = {"93.92", "94.41", "94.68", "95.12", "79.43", "52.90", "55.26"}
NOISY = {"93.42"}  # s10's test accuracy without the 20 noisy images


@pytest.mark.parametrize("page", PAGES)
def test_accuracies_and_losses_in_the_prose_are_those_of_the_files(page):
    made = r"^```.*?^```|^<!-- .*?^<!-- end|`[^`\n]+`"
    prose = re.sub(made, "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    figures = set(re.findall(r"(?<![\d.])(?:\d\d\.\d\d|0\.\d\d\d)(?![\d.])", prose))
    assert figures <= known_figures() | CITED | NOISY


def test_the_cost_of_the_result():
    (minutes,) = re.findall(r"(\d+) minutes on two CPU cores", README)
    runs = files.read_table(IMAGES / "s10" / "runs.csv")
    assert int(minutes) == round(runs["seconds"].mean() / 60)
    assert f"**The result:** {runs['test_acc'].mean():.2f} % of the test images" in README
    assert f"mirror image gives {runs['test_acc_flip'].mean():.2f} %" in README


def test_the_benchmark_page_tells_what_was_measured():
    rows = files.read_table(IMAGES / "benchmark" / "speeds.csv").set_index("what")
    page = PAGES["images/benchmark/README.md"]
    for what, told in {
        "our training over plain": "{median:.2f} times as fast as plain (range {lowest:.2f} to "
        "{highest:.2f})",
        "freed memory kept over given back": "{median:.2f} times as fast ({lowest:.2f} to "
        "{highest:.2f})",
        "our training over the matrix product": "{median:.2f} of the speed of large matrix "
        "products ({lowest:.2f} to {highest:.2f};",
    }.items():
        assert told.format(**rows.loc[what]) in page
    ours, plain = (
        rows.loc[f"training, {way}: backward", "median"]
        / rows.loc[f"training, {way}: forward", "median"] for way in ("ours", "plain")
    )
    assert f"{ours:.1f} times as long as the forward pass, in plain {plain:.1f} times" in page


def anchors(text):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    """In tables, which the files in images/ make, too."""
    text, folder = PAGES[page], Path(ROOT, page).parent
    links = re.findall(r"\]\((?!http)([^)]+)\)|<img src=\"([^\"]+)\"", text)
    for link in map("".join, links):
        name, _, anchor = link.partition("#")
        target = folder / name if name else Path(ROOT, page)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_files_that_the_pages_name():
    names = re.findall(r"`((?:utils|tests)/[\w./]*)`", "\n".join(PAGES.values()))
    assert names
    assert not [name for name in names if not Path(ROOT, name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_each_picture_is_told_in_words(page):
    pictures = re.findall(r"!\[.*?\]\(|<img .*?>", PAGES[page], re.DOTALL)
    told = re.findall(r"!\[[^\]]{10,}\]\(|<img [^>]*alt=\"[^\"]{10,}\"[^>]*>", PAGES[page])
    assert pictures == told


def test_the_readme_is_read_in_one_sitting():
    """Outside tables and code."""
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(re.sub(r"\]\(.*?\)|<.*?>", "", prose).split()) <= 1300


@pytest.mark.parametrize("page", PAGES)
def test_pages_tell_what_is_there(page):
    assert not re.search(r"not yet|still to come", PAGES[page])


def test_the_citation_has_the_title_of_the_readme():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^title: \"(.*)\"$", text, re.MULTILINE)[1] == README.partition("\n")[0][2:]
