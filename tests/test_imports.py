"""Who may import whom, read from the source: what is lower in the house knows nothing of what is above."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "shotstream"
MODULES = {
    ".".join(("shotstream", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# Each may import itself, and what its line names. A name stands for the module and everything in it.
CORE = {
    "flow": "",
    "memory.plan": "",
    "memory.schedule": "memory.plan",
    "memory.policies": "memory.plan memory.schedule",
    "config": "memory.plan memory.schedule memory.policies",
    "story": "config formats",
    "formats": "story config",
    "models": "config flow",
    "memory.store": "memory.plan models.rope",
    "rollout": "flow memory models",
    "checkpoints": "config models",
    "releases": "config memory.plan memory.policies memory.schedule",
    "hub": "checkpoints releases",
    "text_cache": "checkpoints models",
    "footprint": "checkpoints config memory.policies",
    "fast": "checkpoints config models",
    "graphs": "memory.store models",
    "pipeline": "config checkpoints fast graphs hub models releases storybook.captions text_cache",
    "video": "",
    "records": "config storybook.captions",
    "plan": "story",
    "document": "memory.policies plan project records story",
    "project": "config document memory.plan memory.policies plan records story",
    "folder": "memory.plan plan project records story",
    "take": "folder memory models pipeline records rollout",
    "session": "folder memory.plan pipeline project story take video",
    "film": "config fast folder footprint memory pipeline project session story take video",
}
WITHOUT_TORCH = (
    *("memory.plan", "memory.schedule", "memory.policies"),
    *("config", "releases", "story", "formats", "storybook.captions"),
    *("records", "plan", "document", "project", "folder"),
)
ABOVE = ("train", "data", "evaluation", "server", "cli")
OPTIONAL = ("transformers", "diffusers", "sentencepiece", "ftfy")


def within(module: str, names: str | tuple[str, ...]) -> bool:
    """Whether `module` is one of `names` (without the package's name) or lies inside one."""
    names = tuple(names.split()) if isinstance(names, str) else names
    return any(f"{module}.".startswith(f"shotstream.{name}.") for name in names)


def imports(source: str, module: str, everywhere: bool = True) -> set[str]:
    """Modules that a source text imports; with `everywhere` also inside functions and conditions."""
    tree = ast.parse(source)
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join((*package, *([node.module] if node.module else [])))
            # `from a import b` may name the module a.b
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else origin for name in names}
    return found


@cache
def imported_by(module: str, everywhere: bool = True) -> set[str]:
    return imports(MODULES[module].read_text(), module, everywhere)


def reach(module: str) -> set[str]:
    """Everything that comes along when `module` is imported."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        for name in imported_by(todo.pop(), everywhere=False):
            if name not in seen:
                seen.add(name)
                todo += [name] if name in MODULES else []
    return seen


def core_modules() -> list[str]:
    return [module for module in MODULES if within(module, tuple(CORE))]


def test_the_walker_sees_every_kind_of_import():
    source = """
import torch.nn
from shotstream.memory import store
from shotstream.flow import guide
from . import session
from .train.run import Log
def late():
    import shotstream.cli
"""
    assert imports(source, "shotstream.rollout") == {
        "torch.nn",
        *("shotstream.memory.store", "shotstream.flow", "shotstream.session"),
        *("shotstream.train.run", "shotstream.cli"),
    }
    assert "shotstream.cli" not in imports(source, "shotstream.rollout", everywhere=False)
    assert within("shotstream.memory.plan", "memory") and not within("shotstream.memory_plan", "memory")


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_only_what_is_below(name):
    modules = [module for module in MODULES if within(module, name)]
    assert modules
    for module in modules:
        ours = {other for other in imported_by(module) if other.split(".")[0] == "shotstream"}
        wrong = {other for other in ours if not within(other, f"{name} {CORE[name]}")}
        assert not wrong, f"{module} may not import {wrong}"


def test_the_core_knows_nothing_of_training_data_evaluation_and_servers():
    for module in core_modules():
        assert not {name for name in imported_by(module) | reach(module) if within(name, ABOVE)}, module


def test_nobody_imports_the_command_line_or_the_server():
    for module in MODULES:
        if not within(module, "cli server __main__"):
            assert not {name for name in imported_by(module) if within(name, "cli server")}, module


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_decisions_and_stories_need_no_torch(name):
    for module in (module for module in MODULES if within(module, name)):
        heavy = {found for found in reach(module) | imported_by(module) if found.split(".")[0] == "torch"}
        assert not heavy, f"{module} reaches {heavy}"


def test_optional_packages_are_imported_where_they_are_used():
    """Importing a module of ours never needs an extra."""
    for module in MODULES:
        found = {name for name in imported_by(module, everywhere=False) if name.split(".")[0] in OPTIONAL}
        assert not found, module
