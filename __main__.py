"""``python -m excise``."""

from .cli import main

main()
