"""How the notebooks are stored: readable on GitHub, run in order, free of noise."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import nbformat
import pytest
import torch

from utils import data, devices, files, training
from utils.notebook import begin
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
    """Cells exempt from comparison draw a picture or report on a data set or a training run.

    Or they print a table whose form is another library's.
    """
    for cell in code_cells(notebook):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
            words = r"fit|history|last|results|suggestion|begin|metrics|phases|ModelSummary"
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


def test_stored_results_are_those_on_file():
    """The stored run is the recorded one, with its training table and its result."""
    folder = files.IMAGES / "s10"
    runs = files.read_table(folder / "runs.csv")
    history = files.read_table(folder / "history_seed0.csv").to_dict("records")
    s10 = nbformat.read(NOTEBOOKS[0], as_version=4)
    text = "\n".join(o.get("text", "") for cell in code_cells(s10) for o in cell.outputs)
    assert training.table(history) in text
    accuracies = f"test accuracy {runs['test_acc'].mean():.2f} %"
    assert f"recorded runs: {len(runs)}; {accuracies}" in text


@pytest.mark.parametrize("device, weights, wanted, train, epochs", [
    ("cpu", True, None, False, 24), ("cpu", True, "1", True, 24), ("cpu", False, None, True, 5),
    ("cpu", False, "1", True, 24), ("cuda", True, None, True, 24),
])
def test_a_cpu_takes_what_is_recorded(
    device, weights, wanted, train, epochs, tmp_path, monkeypatch
):
    """Unless it is told to train, or nothing is recorded: then it trains for five epochs."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "pictures"))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COURSE_TRAIN", wanted or "")
    monkeypatch.setattr(data, "load", lambda source: f"what lies in {Path(source).name}")
    monkeypatch.setattr(devices, "pick_device", lambda: torch.device(device))
    monkeypatch.setattr(devices, "amp_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(files, "IMAGES", tmp_path)
    if weights:
        (tmp_path / "s10").mkdir()
        (tmp_path / "s10" / "weights.safetensors").write_text("")
    assert begin("s10") == (
        recipe("s10").scaled(epochs=epochs), "what lies in pictures", torch.device(device),
        torch.bfloat16, tmp_path / "runs" / f"s10-pictures-{epochs}-epochs", train,
    )


def test_samples_folder_vanishes_with_the_process():
    script = """
from utils import notebook
folder = notebook.begin("s10")[-2]
(folder / "checkpoint.pt").write_text("")
print(folder)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=NOTEBOOKS[0].parent, capture_output=True, text=True,
        env={**os.environ, "COURSE_DATA": "sample"}, timeout=120, check=True,
    )
    assert not Path(process.stdout.strip()).exists() and process.stdout.strip()


# The first cell, in Colab


@pytest.fixture
def sessions(monkeypatch):
    """Plays Colab's own server: a function that sets what it answers."""
    answer = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/api/sessions"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer[-1].encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
    monkeypatch.setenv("KMP_TARGET_PORT", str(server.server_port))
    yield answer.append
    server.shutdown()
    server.server_close()


@pytest.fixture
def first_cell(notebook, tmp_path, monkeypatch):
    """A function that runs it in an empty folder; git and pip are noted, not run."""
    commands = []

    def note(command, check):
        commands.append(command)
        if command[0] == "git":
            Path(command[-1], "utils").mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", note)
    (source,) = [cell.source for cell in code_cells(notebook) if "REPOSITORY =" in cell.source]
    return lambda **changes: (
        exec(re.sub('REPOSITORY = ""', f"REPOSITORY = {changes.get('repository', '')!r}", source)),
        commands,
    )[1]


def opened_from(address):
    return json.dumps([{"path": f"fileId={urllib.parse.quote(address, safe='')}"}])


@pytest.mark.parametrize("name, branch", [
    ("owner/course", "main"), ("owner/course", "a/branch/with-slashes"), ("a-fork/of_it", "main"),
])
def test_colab_fetches_what_the_notebook_was_opened_from(sessions, first_cell, name, branch):
    sessions(opened_from(f"https://github.com/{name}/blob/{branch}/S10_custom_resnet.ipynb"))
    (git,) = first_cell()
    assert git == ["git", "clone", "--depth", "1", "--branch", branch,
                   f"https://github.com/{name}", "course"]
    assert Path.cwd().name == "course"


@pytest.mark.parametrize("answer", [
    opened_from("1AbC-dEf"), "[]", "{}", "not json", '[{"path": 3}]',
], ids=["Drive", "no session", "another form", "no JSON", "no text"])
def test_opened_from_elsewhere_it_asks_for_the_address(sessions, first_cell, answer):
    sessions(answer)
    with pytest.raises(SystemExit, match="^utils/ is missing: set REPOSITORY, above$"):
        first_cell()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("port", [None, "1"], ids=["not in Colab", "no server"])
def test_without_the_server_it_asks_for_the_address(first_cell, monkeypatch, port):
    if port:
        monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
        monkeypatch.setenv("KMP_TARGET_PORT", port)
    with pytest.raises(SystemExit, match="set REPOSITORY"):
        first_cell()


def test_an_address_given_by_hand_is_taken(first_cell):
    (git,) = first_cell(repository="https://example.org/course")
    assert git[-2:] == ["https://example.org/course", "course"]


def test_colab_installs_what_the_package_needs(first_cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    Path("utils").mkdir()
    (install,) = first_cell()
    assert install[1:] == ["-m", "pip", "install", "-qr", "utils/requirements.txt"]
    needed = Path(__file__).parents[1].joinpath("utils/requirements.txt").read_text("utf-8")
    assert "torch>" in needed and "pytest" not in needed
