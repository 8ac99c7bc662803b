"""What is imported is declared: installing the package brings everything that its modules name."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Imported only where a GGUF file or an adapter is read; the error there names the extra.
OPTIONAL = {"gguf": "demo", "peft": "peft", "ray": "ray"}


def imported() -> dict[str, set[str]]:
    """Every top-level module that src/ imports, with the files that do, below src/headcount."""
    modules: dict[str, set[str]] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                place = path.relative_to(ROOT / "src" / "headcount").as_posix()
                modules.setdefault(name.partition(".")[0], set()).add(place)
    return {name: paths for name, paths in modules.items() if name not in sys.stdlib_module_names | {"headcount"}}


def normal(requirement: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]).lower()


def names(requirements: Iterable[str]) -> set[str]:
    return {normal(requirement) for requirement in requirements}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared, extras = names(project["dependencies"]), project["optional-dependencies"]
    homes = importlib.metadata.packages_distributions()
    for module, paths in imported().items():
        if module in OPTIONAL:
            assert module in names(extras[OPTIONAL[module]]), f"{module}, which {paths} import"
            assert module not in declared
        else:
            assert names(homes[module]) & declared, f"{paths} import {module}, which pyproject.toml does not declare"


def test_only_tasks_know_lm_eval() -> None:
    assert {path.partition("/")[0] for path in imported()["lm_eval"]} == {"tasks"}


def test_what_is_declared_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names(line for line in lines if "==" in line and not line.startswith("#"))
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    assert names([*project["dependencies"], *extras]) <= pinned
