"""Command `jitattn-cache`: compile, list, check, move and delete kernels. Needs no GPU.

Only results go to stdout; progress, questions and messages go to stderr. Exit status: 0 success,
1 a failure or a bad kernel, 2 an invalid command line, 130 and 143 after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import sys

from jitattn.spec import install

try:
    import click
    import rich as _rich  # noqa: F401 - so that its absence is said here
except ImportError as _error:
    sys.stderr.write(f"jitattn-cache needs the extra cli ({_error}): {install.command('cli')}\n")
    sys.exit(2)

from jitattn import __version__
from jitattn.cli import inspect, maintain, move
from jitattn.cli.common import Commands
from jitattn.cli.doctor import doctor
from jitattn.cli.prebuild import prebuild
from jitattn.cli.verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="jitattn", message="%(prog)s %(version)s")
def main() -> None:
    """Look after jitattn's kernel cache."""


for _command in (
    prebuild,
    inspect.list_entries,
    inspect.show,
    inspect.extract,
    inspect.path,
    inspect.stats,
    verify,
    maintain.prune,
    maintain.clear,
    move.export_archive,
    move.import_archive_command,
    doctor,
):
    main.add_command(_command)
