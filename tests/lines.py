"""A `Progress` that keeps what users would read."""


class Lines:
    """Progress that keeps the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def phase(self, name: str, total: int | None = None) -> None:
        return

    def update(self, done: int | None = None, **counters: float) -> None:
        return

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)
