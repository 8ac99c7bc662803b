"""What was found out about this machine, kept as JSON in the user's cache: a file for each kind, an object in it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import platformdirs


def kept(name: str) -> dict[str, Any]:
    """What is kept in a file of this name; empty where there is none, or none that can be read."""
    try:
        known = json.loads(_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # found out again
    return known if isinstance(known, dict) else {}


def keep(name: str, key: str, value: Any) -> None:
    """Keep a value beside the others in a file; where that cannot be written, it is found out again next time."""
    file = _file(name)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps({**kept(name), key: value}, indent=1, sort_keys=True), encoding="utf-8")
        own.replace(file)


def _file(name: str) -> Path:
    return platformdirs.user_cache_path("headcount", appauthor=False) / name
