"""How the package is cut into files: imports go one way, and a name means one thing."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "utils").rglob("*.py"))


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path):
    """The package's files that a file imports, at its top or in a function."""
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT / name.replace(".", "/")
            yield from {place.with_suffix(".py"), place / "__init__.py"}.intersection(FILES)


def order():
    """The files in the order of the README's table, from what needs no other to the commands."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## What lies where")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    paths = re.findall(r"`(utils/[\w/]+\.py)`", "".join(rows))
    return [ROOT / path for path in paths]


def test_the_readme_lists_each_file_once():
    listed = order()
    assert sorted(listed) == [path for path in FILES if path.name != "__init__.py"]


def test_a_file_imports_only_from_files_above_it():
    above = {path for path in FILES if path.name == "__init__.py"}
    for path in sorted(above) + order():
        assert set(imported(path)) <= above, f"{path} imports from below"
        above.add(path)


def test_no_two_files_have_a_function_of_the_same_name():
    functions = Counter(
        node.name
        for path in FILES
        for node in parsed(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    )
    assert {name for name, count in functions.items() if count > 1} <= {"main"}
