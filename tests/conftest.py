"""Fixtures for every test; what tests import stands in ``helpers``."""

from helpers import architecture, save_pico

__all__ = ["architecture", "save_pico"]
