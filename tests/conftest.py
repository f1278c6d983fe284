"""Fixtures for every test; what tests import stands in ``helpers``."""

import gc
import importlib
import os
from contextlib import ExitStack

import pytest
from warm import SESSION, session_folder


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder that workers share; import the fixtures where tests run."""
    if not hasattr(config, "workerinput"):
        stack = ExitStack()
        config.add_cleanup(stack.close)
        os.environ[SESSION] = str(stack.enter_context(session_folder()))
        stack.callback(os.environ.pop, SESSION)
        if config.getoption("numprocesses", None):
            return
    config.pluginmanager.register(importlib.import_module("helpers"))


def pytest_collection_finish() -> None:
    """What was imported so far is not looked through again: every training and every release of memory collects garbage,
    a quarter of a second each."""
    gc.collect()
    gc.freeze()
