"""What a run shows while it runs: live on a terminal, plain lines elsewhere, nothing if quiet.

`Terminal` is the `progress.Progress` of the commands. What is shown at the end stands in `tables`.
"""

import io
import re
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns, where the output is not a terminal."""

PLAIN_INTERVAL_S = 5.0
"""Least time between two plain progress lines of one phase."""


class Terminal:
    """A command's output, or what `rr.search` tells while it runs.

    A context manager: a live display ends with it, whatever happens.

    Args:
        file: where everything for people goes; stdout by default.
        quiet: show nothing but what `say` is told.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        file = sys.stdout if file is None else file
        live = bool(file and file.isatty())
        if isinstance(file, io.TextIOWrapper) and file.errors == "strict":
            file.reconfigure(errors="replace")  # what the encoding lacks costs no result
        self.console = Console(
            file=file, force_terminal=live, width=None if live else WIDTH, highlight=False
        )
        self.quiet = quiet
        self._clock = clock
        self._phase: _Phase | None = None
        self._live: Live | None = None
        self._animated = live and not self.console.is_dumb_terminal
        self._last_plain_s = 0.0
        self._last_plain = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_phase(finished=kind is None)

    def say(self, text: str) -> None:
        """Prints a text, quiet or not; if quiet, in one line."""
        self.console.print(Text(printable(text)), soft_wrap=self.quiet)

    def show(self, content: RenderableType) -> None:
        """Prints a table, or a text (names in it are never taken for markup)."""
        if not self.quiet:
            self.console.print(content, markup=False)

    def show_lines(self, *lines: str) -> None:
        """Prints lines that are to be copied: never wrapped."""
        if not self.quiet:
            for line in lines:
                self.console.print(Text(line), soft_wrap=True)

    def message(self, text: str) -> None:
        """See `Progress`."""
        self.show(Text(printable(text)))

    def phase(self, name: str, total: int | None = None) -> None:
        """See `Progress`."""
        self.end_phase()
        if self.quiet:
            return
        self._phase = _Phase(printable(name), total, self._clock)
        if self._animated:
            self._live = Live(
                console=self.console,
                get_renderable=self._render,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        else:
            self._plain_line()

    def update(self, done: int | None = None, **counters: float) -> None:
        """See `Progress`."""
        if self._phase is None:
            return
        self._phase.update(done, counters)
        waited = self._clock() - self._last_plain_s
        if not self._animated and waited >= PLAIN_INTERVAL_S:
            self._plain_line()

    def _plain_line(self) -> None:
        assert self._phase
        if self._phase.figures() == self._last_plain:  # nothing has happened since
            return
        self._last_plain_s, self._last_plain = self._clock(), self._phase.figures()
        self.show(Text(self._phase.line()))

    def _render(self) -> RenderableType:
        return self._phase.render() if self._phase else Text("")

    def end_phase(self, *, finished: bool = True) -> None:
        """The phase has ended; the live display makes room for what comes next."""
        phase, self._phase = self._phase, None
        if self._live is not None:
            self._live.stop()
            self._live = None
        if phase is not None and finished:
            self.show(Text(phase.last_line()))


class _Phase:
    """Where a phase stands, in words."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float]) -> None:
        self._name, self._total, self._clock = name, total, clock
        self._start_s = clock()
        self._first: int | None = None
        self._done = 0
        self._counters: dict[str, float] = {}

    def update(self, done: int | None, counters: dict[str, float]) -> None:
        if done is not None:
            # what an earlier run had done says nothing about this one's speed
            self._first = done if self._first is None else self._first
            self._done = done
        self._counters = {**self._counters, **counters}

    def figures(self) -> str:
        return f"{self._name} {self._amount()} {self._counts()}"

    def line(self) -> str:
        if self._first is None and self._total is None:
            return f"{self._name} ..."
        parts = [f"{self._amount()} in {duration(self._elapsed_s())}", self._left(), self._counts()]
        return f"{self._name}: " + "; ".join(part for part in parts if part)

    def last_line(self) -> str:
        counts = self._counts()
        amount = f"{self._amount()} " if self._first is not None else "done "
        return f"{self._name}: {amount}in {duration(self._elapsed_s())}" + (
            f"; {counts}" if counts else ""
        )

    def render(self) -> RenderableType:
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._total, completed=self._done, width=24)
        row.add_row(
            Text(self._name), bar, self._amount(), duration(self._elapsed_s()), self._left()
        )
        return Group(row, Text("  " + self._counts())) if self._counters else row

    def _elapsed_s(self) -> float:
        return self._clock() - self._start_s

    def _amount(self) -> str:
        return number(self._done) + (f"/{number(self._total)}" if self._total else "")

    def _left(self) -> str:
        done = self._done - (self._first or 0)
        if not self._total or done <= 0:
            return ""
        left_s = self._elapsed_s() * max(0.0, self._total - self._done) / done
        return f"about {duration(left_s)} left"

    def _counts(self) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')} {number(value)}" for name, value in self._counters.items()
        )


def number(value: float) -> str:
    """A count with thousands separators, or a figure to three digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3g}"


def counted(amount: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "trial"), counted(2000, "trial")
    ('1 trial', '2,000 trials')
    """
    return f"{number(amount)} {noun}{'' if amount == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time as people read it.

    >>> [duration(s) for s in (7.4, 200, 3720)]
    ['7 s', '3 min 20 s', '1 h 02 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def printable(text: str) -> str:
    r"""The text in one line, without control characters, which could rewrite the terminal.

    >>> printable("a\n b\x1b[2J")
    'a b?[2J'
    """
    one_line = re.sub(r"\s*[^\S ]\s*", " ", text)
    return "".join(c if c.isprintable() else "?" for c in one_line)


def shortened(text: str, columns: int) -> Text:
    """A name that fits a table's column, wide characters counted as two."""
    short = Text(printable(text), no_wrap=True)
    short.truncate(columns, overflow="ellipsis")
    return short
