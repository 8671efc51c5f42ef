"""The commands of `megatron-bridge`, declared.

Importing this imports no command: `--help` answers at once, and a command waits for no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

import click

from megatron.bridge.cli import outcome
from megatron.bridge.cli.output import WIDTH

_EPILOG = (
    "Exit status: 0 done; 1 the two sides differ (verify, compare); 2 the input cannot be used; "
    "70 a fault of this program; 130 interrupted."
)


class _Declared(NamedTuple):
    """Where the function of a command stands, and what the list of commands says of it."""

    module: str
    function: str
    summary: str


_COMMANDS: Mapping[str, _Declared] = {
    "inspect": _Declared(
        "inspect", "inspect", "Show what a model or checkpoint holds, and how it converts."
    ),
    "plan": _Declared(
        "plan", "plan", "Show what a conversion will do, and what each rank of a cluster will hold."
    ),
    "import": _Declared("convert", "import_command", "Hugging Face model to Megatron checkpoint."),
    "export": _Declared("convert", "export_command", "Megatron checkpoint to Hugging Face model."),
    "verify": _Declared(
        "verify", "verify", "Compare two checkpoints, tensor by tensor, bit by bit."
    ),
    "compare": _Declared(
        "compare", "compare", "Compare transformers with Megatron-Core on one prompt."
    ),
    "make-model": _Declared(
        "make_model", "make_model", "Make a small random model in the released layout."
    ),
}


class _Commands(click.Group):
    """The group of all commands, which imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if (declared := _COMMANDS.get(cmd_name)) is None:
            raise click.NoSuchCommand(cmd_name, possibilities=_COMMANDS, ctx=ctx)
        module = import_module(f"megatron.bridge.cli.commands.{declared.module}")
        function = outcome.guarded(getattr(module, declared.function))
        return click.command(cmd_name, epilog=_EPILOG)(function)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.summary) for name, one in _COMMANDS.items()])


@click.command(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": WIDTH,
        "show_default": True,
    },
)
@click.option(
    "--debug",
    is_flag=True,
    help=f"Print the traceback of an error; so does {outcome.DEBUG_VARIABLE}=1.",
)
@click.version_option(
    package_name="megatron-bridge-vl",
    prog_name="megatron-bridge",
    message="%(prog)s %(version)s",
    help="Print the version.",
)
def commands(debug: bool) -> None:
    """Convert vision-language models between Hugging Face and Megatron-Core, bit for bit."""
    outcome.debug.set(debug)
