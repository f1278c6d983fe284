"""Fixtures for every test; what tests import stands in ``helpers``."""

import importlib
import os
from contextlib import ExitStack

import pytest
from warm import SOCKETS, warm_server


def pytest_configure(config: pytest.Config) -> None:
    """Start what commands are forked from, once a session; import the fixtures where tests run."""
    shared = bool(config.getoption("numprocesses", None))
    if not hasattr(config, "workerinput"):
        stack = ExitStack()
        config.add_cleanup(stack.close)
        # As helpers have it: workers share the processor, so do the commands that they start.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if shared else {}
        os.environ[SOCKETS] = str(
            stack.enter_context(warm_server(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", **threads))
        )
        stack.callback(os.environ.pop, SOCKETS)
        if shared:
            return
    config.pluginmanager.register(importlib.import_module("helpers"))
