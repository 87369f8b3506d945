"""How the notebooks are stored: readable on GitHub, run in order, free of noise."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch

from tests.conftest import Small, tiny_images
from utils import data, devices, files, run, training
from utils.notebook import begin, is_recorded, run_folder
from utils.recipes import recipe
from utils.results import read_predictions

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
    assert len(definitions) <= 2


def test_more_prose_than_code(notebook):
    words = {"code": 0, "markdown": 0}
    for cell in notebook.cells:
        words[cell.cell_type] += len(re.findall(r"[A-Za-z]{2,}", cell.source))
    assert words["markdown"] > words["code"]


def test_outputs_are_compared_unless_a_run_or_a_picture_decides_them(notebook):
    """Cells exempt from comparison draw a picture, or report on a data set, on the network that is
    built for it, which is narrow for the sample, or on a training run.

    Or they print a table whose form is another library's.
    """
    for cell in code_cells(notebook):
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            drawn = any("image/png" in output.get("data", {}) for output in cell.outputs)
            words = r"fit|history|last|results|suggestion|begin|metrics|phases|ModelSummary"
            words += r"|models\.build\("
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


# What S10 says of its stored run, against the files


@pytest.fixture(scope="module")
def s10():
    return nbformat.read(NOTEBOOKS[0], as_version=4)


def prose(notebook, last=""):
    """The texts, as far as one that has `last` in it."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    end = next(i for i, text in enumerate(texts) if last in text) if last else len(texts)
    return "\n".join(texts[: end + 1])


def test_the_assignment_in_4000_words_with_questions(s10):
    text = prose(s10, "### Summary")
    assert len(text.split()) <= 4000
    sections = re.split(r"^## (?=\d)", text, flags=re.MULTILINE)[1:]
    asked = [section.partition(" ")[0] for section in sections if "<details><summary>" in section]
    assert asked == ["3", "4", "5", "6", "7", "8"]
    assert text.count("<details>") == text.count("</details>")


def test_pictures_and_pages_that_notebooks_name_are_there(notebook):
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", prose(notebook))
    assert links
    for link in links:
        assert (NOTEBOOKS[0].parent / link.partition("#")[0]).exists(), link


def test_percentages_of_the_stored_run_were_printed_or_are_on_file(s10):
    folder = files.IMAGES / "s10"
    known = {f"{share:.1f}" for share in read_predictions(
        folder / "predictions.safetensors").per_class.values()}
    known |= {f"{files.read_table(folder / 'tuning.csv')['validation_acc'][0]:.2f}"}
    for path in (folder, folder / "without_decay"):
        last = files.read_table(path / "history_seed0.csv").iloc[-1]
        known |= {f"{last[name]:.2f}" for name in ("train_acc", "test_acc")}
    outputs = [o.get("text", "") for cell in code_cells(s10) for o in cell.outputs]
    known |= set(re.findall(r"\d+\.\d+", "".join(outputs)))
    said = "\n".join(re.findall(r"^>.*", prose(s10), re.MULTILINE))
    assert set(re.findall(r"(\d+\.\d+) %", said)) <= known
    assert said.count("**Stored run.**") > 10


def test_counts_and_gaps_of_the_stored_run_are_those_on_file(s10):
    folder, said = files.IMAGES / "s10", prose(s10)
    results = read_predictions(folder / "predictions.safetensors")
    errors = results.confusion.clone().fill_diagonal_(0)
    animal = torch.tensor([name not in ("airplane", "automobile", "ship", "truck")
                           for name in results.classes])
    cat, bird, airplane = map(results.classes.index, ("cat", "bird", "airplane"))
    within, among = errors[animal][:, animal].sum(), errors[~animal][:, ~animal].sum()
    assert f"{errors[cat].sum()} of the {errors.sum()} mistakes" in said
    assert (f"Of the {errors.sum()} mistakes {within} stay among the animals and {among} among the "
            f"vehicles; {errors.sum() - within - among} take") in said
    crossing = errors[airplane, animal].sum() + errors[animal, airplane].sum()
    assert f"involved in {crossing} of these {errors.sum() - within - among}" in said
    between = errors[airplane, bird] + errors[bird, airplane]
    assert f"{between} mistakes are between airplane and bird" in said
    gaps = [f"{row.train_acc - row.test_acc:.1f}"
            for row in files.read_table(folder / "history_seed0.csv").itertuples()]
    assert (f"{gaps[3]} points after epoch 4, {gaps[7]} after epoch 8, {gaps[11]} after epoch 12, "
            f"{gaps[14]} after epoch 15") in said
    assert f"grows slowly, from {gaps[16]} to {gaps[23]} points" in said


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """What is loaded: a few of them. Results are recorded, and runs made, in other folders."""
    monkeypatch.setenv("COURSE_DATA", "pictures")
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COURSE_TRAIN", "")
    monkeypatch.setenv("COURSE_RESIZE", "8")
    monkeypatch.setattr(data, "load", lambda source, resize: tiny_images(resize))
    monkeypatch.setattr(devices, "amp_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(devices, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(files, "IMAGES", tmp_path / "images")
    return tiny_images()


def record_weights(images, name="s10"):
    """Those of a recorded run."""
    about = run.weights_metadata(recipe(name), images)
    files.save_tensors(Small(3).state_dict(), files.IMAGES / name / "weights.safetensors", about)


def test_an_empty_size_is_none(pictures, monkeypatch):
    monkeypatch.setenv("COURSE_RESIZE", "")
    monkeypatch.setattr(data, "load", lambda source, resize: tiny_images(resize or 12))
    assert begin("s10")[1].size == (12, 12)


@pytest.mark.parametrize("device, weights, wanted, train, epochs", [
    ("cpu", True, "", False, 24), ("cpu", True, "1", True, 24), ("cpu", False, "", True, 5),
    ("cpu", False, "1", True, 24), ("cuda", True, "", True, 24),
])
def test_a_cpu_takes_what_is_recorded(
    device, weights, wanted, train, epochs, pictures, monkeypatch, capsys
):
    """Unless it is told to train, or nothing is recorded: then it trains for five epochs."""
    monkeypatch.setenv("COURSE_TRAIN", wanted)
    monkeypatch.setattr(devices, "pick_device", lambda: torch.device(device))
    if weights:
        record_weights(pictures)
    settings, images, *others = begin("s10")
    assert images.fingerprint == pictures.fingerprint
    assert [settings, *others] == [
        recipe("s10").scaled(epochs=epochs), torch.device(device),
        torch.bfloat16 if train else None, train,
    ]
    said = capsys.readouterr().out
    assert ("read from images/s10" in said, "5 of 24 epochs" in said) == (not train, epochs == 5)


def test_a_run_with_validation_images_is_known_by_those_it_trained_on(pictures):
    images = data.with_validation(pictures, fraction=0.1)
    record_weights(images, "s12")
    _, begun, *_, train = begin("s12")
    assert (begun.fingerprint, train) == (images.fingerprint, False)


def test_what_is_recorded_is_for_the_images_that_it_was_made_on(pictures):
    """But for a few pixels, in which copies of CIFAR-10 differ."""
    record_weights(pictures)
    copy, other = pictures.train_images.clone(), pictures.train_images.clone()
    copy[0, 2, 0, 0] ^= 1
    other[:, 2, 0] ^= 255
    assert is_recorded("s10", replace(pictures, train_images=copy))
    assert not is_recorded("s10", replace(pictures, train_images=other))
    assert not is_recorded("s10", replace(pictures, classes=("a", "b", "d")))
    large = {name: getattr(pictures, name).repeat_interleave(2, 2)
             for name in ("train_images", "test_images")}  # of the same mean
    assert not is_recorded("s10", replace(pictures, **large))
    assert not is_recorded("s12", pictures)


def test_a_run_has_a_folder_of_its_own(pictures, monkeypatch):
    """By its settings and its images, in the folder that is named, at home too."""
    s10, others = recipe("s10"), replace(pictures, train_images=pictures.test_images)
    folders = [run_folder(s10, pictures), run_folder(s10.replace(cutout=0), pictures),
               run_folder(s10.scaled(epochs=4), pictures), run_folder(s10, others)]
    assert len(set(folders)) == 4
    assert run_folder(recipe("s10"), tiny_images()) == folders[0]
    monkeypatch.setenv("COURSE_RUNS", "~/runs")
    assert run_folder(s10, pictures) == Path.home() / "runs" / folders[0].name


def test_samples_folder_vanishes_with_the_process():
    script = """
from utils import notebook
recipe, images, *_ = notebook.begin("s10")
folder = notebook.run_folder(recipe, images)
folder.mkdir()
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


def write_course(folder):
    (folder / "utils").mkdir(parents=True)
    (folder / "utils" / "recipes.py").write_text("")


@pytest.fixture
def first_cell(notebook, tmp_path, monkeypatch):
    """A function that runs it in an empty folder; git and pip are noted, not run."""
    commands = []

    def note(command, check):
        commands.append(command)
        if command[0] == "git":
            write_course(Path(command[-1]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
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


def test_another_projects_utils_are_not_taken_for_the_courses(first_cell):
    Path("utils").mkdir()
    (git,) = first_cell(repository="https://example.org/course")
    assert git[-1] == Path.cwd().name == "course"
    assert sys.path[0] == str(Path.cwd())


def test_colab_installs_what_the_package_needs(first_cell, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    write_course(Path())
    (install,) = first_cell()
    assert install[1:] == ["-m", "pip", "install", "-qr", "utils/requirements.txt"]
    needed = Path(__file__).parents[1].joinpath("utils/requirements.txt").read_text("utf-8")
    assert "torch>" in needed and "pytest" not in needed
