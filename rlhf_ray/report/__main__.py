"""`python -m rlhf_ray.report DIR`: writes the results page of a sweep, or serves it live."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.commands import command_line
from rlhf_ray.commands.command_line import OK
from rlhf_ray.commands.terminal import Terminal
from rlhf_ray.errors import InputError

PROG = "python -m rlhf_ray.report DIR"

DESCRIPTION = (
    "Writes the results page of a sweep (DIR, the folder that the launch command names) to "
    "DIR/report.html, or serves it on 127.0.0.1, where it follows a running sweep by itself. "
    "Exit status: 0; 2 bad input; 1 all else; 130 interrupted."
)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What this command does.

    Attributes:
        serve: serve the page on 127.0.0.1 until Ctrl-C; nothing is written.
        port: to serve on, 0 to 65535; 0: any that is free.
    """

    serve: bool = False
    port: int = 8642

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must lie in [0, 65535], got port={self.port}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command_line.run(lambda: _report(arguments), on_interrupt="stopped.")


def _report(arguments: list[str]) -> int:
    folder = None
    if arguments and not arguments[0].startswith("-"):
        folder, *arguments = arguments
    flags = list(command_line.flags_of(ReportOptions).values())
    values = command_line.parse(
        arguments, prog=PROG, description=DESCRIPTION, groups={"page": flags}
    )
    options = command_line.pick(ReportOptions, values)
    if folder is None:
        raise InputError(
            "the sweep's folder must be given first, got none. "
            "python -m rlhf_ray.launch --list shows the sweeps that there are."
        )
    with Terminal(sys.stdout) as terminal:
        if options.serve:
            _serve(folder, options.port, terminal)
        else:
            _write(folder, terminal)
    return OK


def _write(folder: str, terminal: Terminal) -> None:
    from rlhf_ray.report.gathering import at
    from rlhf_ray.report.live import write_report

    storage, name = at(folder)
    terminal.show_lines(f"The results page is {write_report(storage, name)}")


def _serve(folder: str, port: int, terminal: Terminal) -> None:
    from rlhf_ray.report.gathering import Gatherer, at
    from rlhf_ray.report.serving import HOST, server_of

    storage, name = at(folder)
    with server_of(Gatherer(storage, name), port) as server:
        terminal.show_lines(f"The results page is at http://{HOST}:{server.server_port}/ (Ctrl-C)")
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
