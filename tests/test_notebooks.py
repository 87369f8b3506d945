"""How the notebooks are stored: readable on GitHub, run in order, free of noise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from utils.recipes import recipe

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_valid_and_without_widgets(notebook):
    """GitHub refuses to show a notebook whose widget state is incomplete."""
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    types = {t for c in code_cells(notebook) for o in c.outputs for t in o.get("data", {})}
    assert types <= {"image/png", "text/plain", "text/markdown"}


def test_stored_as_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_errors_and_no_stderr(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_short_cells_and_no_logic_in_them(notebook):
    sources = [cell.source for cell in code_cells(notebook)]
    assert max(len(source.splitlines()) for source in sources) <= 20
    definitions = re.findall(r"^\s*(?:def|class) ", "\n".join(sources), re.MULTILINE)
    assert len(definitions) <= 1


def test_more_prose_than_code(notebook):
    words = {"code": 0, "markdown": 0}
    for cell in notebook.cells:
        words[cell.cell_type] += len(re.findall(r"[A-Za-z]{2,}", cell.source))
    assert words["markdown"] > words["code"]


def test_outputs_are_compared_unless_a_run_or_a_picture_decides_them(notebook):
    """Cells exempt from comparison draw a picture or report on a data set or a training run."""
    for cell in code_cells(notebook):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
            words = r"fit|history|last|results|suggestion|begin|metrics|phases"
            reports = re.search(words, cell.source)
            assert drawn or reports, cell.source


def test_smallest_picture_files_that_serve(notebook):
    assert len(nbformat.writes(notebook)) < 4_000_000  # GitHub shows nothing above about 10 MB


def test_stored_recipe_is_the_one_that_there_is(notebook):
    """Of as many epochs as the stored run had."""
    (cell,) = [cell for cell in code_cells(notebook) if "notebook.begin(" in cell.source]
    (name,) = re.findall(r'notebook\.begin\("(\w+)"\)', cell.source)
    text = "".join(output.text for output in cell.outputs)
    (stored,) = re.findall(r"^recipe +(.*(?:\n +.*)*)", text, re.MULTILINE)
    stored = " ".join(stored.split())
    epochs = re.search(r"\bepochs (\d+)", stored)
    assert stored == str(recipe(name).scaled(epochs=epochs and int(epochs[1])))


def test_samples_folder_vanishes_with_the_process():
    script = """
from utils import notebook
folder = notebook.begin("s10")[-1]
(folder / "checkpoint.pt").write_text("")
print(folder)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=NOTEBOOKS[0].parent, capture_output=True, text=True,
        env={**os.environ, "COURSE_DATA": "sample"}, timeout=120, check=True,
    )
    assert not Path(process.stdout.strip()).exists() and process.stdout.strip()
