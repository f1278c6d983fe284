"""Benchmarks whose own tables ``excise eval --suite`` prints: one row each."""

from importlib import import_module
from typing import Any

SUITES: dict[str, str] = {
    "tofu": "forget quality, model utility and its nine numbers, on fictitious authors (Maini et al. 2024)",
    "muse": "VerbMem, KnowMem and PrivLeak, on texts to forget (Shi et al. 2024)",
    "wmdp": "lettered multiple choice by domain, beside what should stay (Li et al. 2024)",
    "rwku": "answers at three levels of asking, neighbours and membership, on one person (Jin et al. 2024)",
}
"""Each is a module of this package with ``PACKAGES``, ``needs``, ``measure``, ``figures`` and ``FORMAT``."""


def suite_module(name: str) -> Any:
    """The module of a suite."""
    return import_module(f".{name}", __package__)
