"""The front of a search, drawn anew on the terminal after every trial."""

from collections.abc import Sequence
from typing import Any


class Live:
    """A table on stderr that stands until the search ends."""

    def __init__(self, asked: Any):
        from rich.console import Console
        from rich.live import Live as RichLive

        self.asked = asked
        self.live = RichLive(console=Console(stderr=True), transient=True, auto_refresh=False)
        self.started = False

    def show(self, done: Sequence[Any], front: Sequence[Any]) -> None:
        """Draw the front, with the last trial below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from ..search.results import line, table

        header, rows = table(self.asked, front[-12:])
        drawn = Table(box=None, header_style="dim", pad_edge=False)
        # What was varied comes last, and is cut first where the terminal is narrow.
        for place, name in enumerate(header):
            drawn.add_column(Text(name), no_wrap=place <= len(self.asked.rules.objectives), overflow="ellipsis")
        for row in rows:
            drawn.add_row(*map(Text, row))
        if not self.started:
            self.live.start()
            self.started = True
        said = Text(line(done, front, self.asked.rules.objectives, self.asked.trials), style="dim")
        self.live.update(Group(drawn, said), refresh=True)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self.started:
            self.live.stop()
