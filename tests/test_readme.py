"""The pages' figures come from files; their commands, and the notebooks', are those there are."""

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


def test_the_python_of_the_readme_runs():
    (source,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    names = {}
    exec(source, names)
    assert names["model"].metadata["recipe"] == "s10"


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
    assert len(README.splitlines()) <= 200


def test_the_citation_has_the_title_of_the_readme():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^title: \"(.*)\"$", text, re.MULTILINE)[1] == README.partition("\n")[0][2:]
