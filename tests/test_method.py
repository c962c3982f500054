"""docs/method.md points at code: every `file.py:Name` in it is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "method.md").read_text()
POINTERS = sorted(set(re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", TEXT)))
NAMES = sorted(set(re.findall(r"`([A-Z]\w+)\.(\w+)`", TEXT)))  # `DualBuffer.turn`


@cache
def names(path: Path) -> frozenset[str]:
    """Everything a file defines: functions, classes, their methods and fields, constants."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(found)


def test_the_reader_of_names_finds_functions_fields_and_constants():
    here = names(Path(__file__))
    assert {"names", "ROOT", "POINTERS"} <= here and "visit" not in here
    assert "DiTConfig.heads" in names(ROOT / "src" / "shotstream" / "config.py")
    assert len(POINTERS) > 25 and len(NAMES) > 8


@pytest.mark.parametrize(("path", "name"), POINTERS)
def test_what_is_pointed_at_is_there(path, name):
    file = ROOT / "src" / "shotstream" / path
    assert file.is_file(), path
    assert not name or name in names(file), f"{path} has no {name}"


@pytest.mark.parametrize(("owner", "field"), NAMES)
def test_fields_that_are_named_exist(owner, field):
    files = (ROOT / "src" / "shotstream").rglob("*.py")
    defined = {name for file in files for name in names(file) if name.startswith(f"{owner}.")}
    assert f"{owner}.{field.rstrip('_')}" in defined or any(name.startswith(f"{owner}.{field}") for name in defined)
