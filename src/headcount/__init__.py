"""headcount: which attention heads and feed-forward blocks of a language model does in-context learning need?

The names below are imported when they are first used, so that importing headcount stays fast and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Budget": "engine.pack",
    "Evaluations": "results",
    "HeadcountError": "errors",
    "Importance": "results",
    "Mask": "masks",
    "StudySpec": "study.spec",
    "evaluate": "measure.evaluate",
    "ffn_importance": "measure.importance",
    "forecast": "study.forecast",
    "get_tasks": "tasks.load",
    "head_importance": "measure.importance",
    "load": "model.load",
    "open_study": "analysis.study",
    "prune": "masks",
    "random_order": "masks",
    "remove": "removal.remove",
    "removal_order": "masks",
    "run_study": "study.runner",
    "wrap": "model.load",
    "write_report": "report.page",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from headcount.analysis.study import open_study as open_study
    from headcount.engine.pack import Budget as Budget
    from headcount.errors import HeadcountError as HeadcountError
    from headcount.masks import Mask as Mask
    from headcount.masks import prune as prune
    from headcount.masks import random_order as random_order
    from headcount.masks import removal_order as removal_order
    from headcount.measure.evaluate import evaluate as evaluate
    from headcount.measure.importance import ffn_importance as ffn_importance
    from headcount.measure.importance import head_importance as head_importance
    from headcount.model.load import load as load
    from headcount.model.load import wrap as wrap
    from headcount.removal.remove import remove as remove
    from headcount.report.page import write_report as write_report
    from headcount.results import Evaluations as Evaluations
    from headcount.results import Importance as Importance
    from headcount.study.forecast import forecast as forecast
    from headcount.study.runner import run_study as run_study
    from headcount.study.spec import StudySpec as StudySpec
    from headcount.tasks.load import get_tasks as get_tasks


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'headcount' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headcount.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
