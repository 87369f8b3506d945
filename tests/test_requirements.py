"""What is installed where, and what tries it."""

from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))


def required(platform):
    """{name: its specifier} of the package's requirements on a platform."""
    lines = (ROOT / "utils/requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line.partition("#")[0]) for line in lines if not line.startswith("#")]
    return {
        each.name: each.specifier
        for each in wanted
        if each.marker is None or each.marker.evaluate({"sys_platform": platform})
    }


@pytest.mark.parametrize("platform, oldest", [
    ("linux", "2.11.0"), ("win32", "2.11.0"),
    ("darwin", "2.14.0"),  # before, training on Apple's GPUs went wrong without a word
])
def test_oldest_torch(platform, oldest):
    versions = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.0", "2.15.0"]
    assert next(required(platform)["torch"].filter(versions)) == oldest


def test_a_job_tries_the_lower_bounds_where_they_differ():
    oldest = WORKFLOW["jobs"]["oldest"]
    assert set(oldest["strategy"]["matrix"]["os"]) == {"ubuntu-latest", "macos-latest"}
    commands = [step.get("run", "") for step in oldest["steps"]]
    assert any("--resolution lowest-direct" in command for command in commands)
    assert commands[-1] == "pytest --nbval"


def test_jobs_try_every_python_that_the_libraries_allow():
    matrix = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]
    versions = {*matrix["python"], *(job["python"] for job in matrix["include"])}
    assert versions == {"3.10", "3.11", "3.12", "3.13", "3.14"}


def test_a_pull_request_is_tried_once():
    """A push to its branch starts nothing by itself."""
    events = WORKFLOW[True]  # YAML's reading of "on"
    assert events["push"]["branches"] == ["main"] and "pull_request" in events
