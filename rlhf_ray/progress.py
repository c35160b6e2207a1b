"""How long work says where it is: the interface it calls, and the one that is silent."""

from typing import Protocol


class Progress(Protocol):
    """Told what happens; may be called from several threads."""

    def message(self, text: str) -> None:
        """One line for the user."""
        ...

    def phase(self, name: str, total: int | None = None) -> None:
        """A new phase begins: its name, and how many units of work it has if that is known."""
        ...

    def update(self, done: int | None = None, **counters: float) -> None:
        """Where the phase is: units done, and counters to show (stages, trials, ...)."""
        ...


class _Silent:
    def message(self, text: str) -> None:
        return

    def phase(self, name: str, total: int | None = None) -> None:
        return

    def update(self, done: int | None = None, **counters: float) -> None:
        return


NO_PROGRESS: Progress = _Silent()
"""Says nothing."""
