"""Python files that results depend on: those that define what is used, and what they import, but for installed ones.

Of Python's own library and of installed packages the version says which code runs; of a user's files, and of code that
comes with a model or a task, only its text does. Imports are read off the text (`ast`), so that a module counts whether
it is loaded yet or not, and one that is imported for a constant counts, too. What code loads by other means (a name
made at run time, a data file) is not seen.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path


def own_files(starts: Iterable[Path]) -> dict[Path, str]:
    """Texts of these files and of all files that they import, one by another, but for installed ones."""
    texts: dict[Path, str] = {}
    waiting = [path.resolve() for path in starts]
    while waiting:
        path = waiting.pop()
        if path in texts or is_installed(path):
            continue
        try:
            texts[path] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # an extension module, say
            continue
        waiting += [found.resolve() for found in _imported(path, texts[path])]
    return texts


def digests(texts: dict[Path, str]) -> list[str]:
    """One line for each file, its name and its digest, whatever folder it lies in."""
    return sorted(f"{path.name} {hashlib.sha256(text.encode()).hexdigest()}" for path, text in texts.items())


def is_installed(path: Path) -> bool:
    """Whether a Python file is of Python itself, of an installed package or of headcount: its version identifies it."""
    resolved = path.resolve()
    return bool({*resolved.parents} & _libraries() or {"site-packages", "dist-packages"} & {*resolved.parts})


@functools.cache  # of this interpreter, which does not move
def _libraries() -> frozenset[Path]:
    places = sysconfig.get_paths()
    own = Path(__file__).resolve().parent  # which may be installed in place
    return frozenset({own, *(Path(places[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))})


def _imported(path: Path, text: str) -> Iterator[Path]:
    """Files of the modules that a file names in its imports."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name, path.parent)
        elif isinstance(node, ast.ImportFrom):
            # Each name may be a module of that package.
            for name in ("", *(f".{alias.name}" for alias in node.names)):
                module = f"{node.module or ''}{name}".strip(".")
                if node.level:
                    yield from _below(module, path.parents[node.level - 1])
                else:
                    yield from _files(module, path.parent)


def _files(module: str, folder: Path) -> Iterator[Path]:
    """The files of a module and of the packages that it lies in, found as Python finds them, or in this folder."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        yield from _below(module, folder)
    elif spec.origin is not None and Path(spec.origin).is_file():
        yield Path(spec.origin)
        for end in range(1, len(inner) + 1):
            yield from _below(".".join(inner[:end]), Path(spec.origin).parent)


def _below(module: str, folder: Path) -> Iterator[Path]:
    place = folder.joinpath(*module.split(".")) if module else folder
    for path in (place.with_suffix(".py") if module else place / "__init__.py", place / "__init__.py"):
        if path.is_file():
            yield path
