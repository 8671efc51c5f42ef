"""The commands of `megatron-bridge`, declared.

Nothing here or in the modules of the commands imports torch, transformers or megatron-core at the
top: `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from megatron.bridge.cli import outcome
from megatron.bridge.cli.commands.compare import compare
from megatron.bridge.cli.commands.convert import export_command, import_command
from megatron.bridge.cli.commands.inspect import inspect
from megatron.bridge.cli.commands.make_model import make_model
from megatron.bridge.cli.commands.plan import plan
from megatron.bridge.cli.commands.verify import verify
from megatron.bridge.cli.outcome import guarded
from megatron.bridge.cli.output import WIDTH

_EPILOG = (
    "Exit status: 0 done; 1 the two sides differ (verify, compare); 2 the input cannot be used; "
    "70 a fault of this program; 130 interrupted."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes longer than all the rest
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"megatron-bridge {version('megatron-bridge-vl')}")
        raise typer.Exit


def _print_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(context.get_help())
        raise typer.Exit


# typer's own --help of a group imports pydantic whenever one of its commands is called.
@app.callback(add_help_option=False)
def root(
    *,
    debug: Annotated[
        bool,
        # Read from the environment by `outcome`: typer's envvar would import pydantic first.
        typer.Option(
            "--debug",
            help=f"Print the traceback of an error; so does {outcome.DEBUG_VARIABLE}=1.",
        ),
    ] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    _help: Annotated[
        bool,
        typer.Option(
            "--help", "-h", callback=_print_help, is_eager=True, help="Show this message."
        ),
    ] = False,
) -> None:
    """Convert vision-language models between Hugging Face and Megatron-Core, bit for bit."""
    outcome.debug.set(debug)


# Name, command, and what the list of commands says of it.
_COMMANDS = (
    ("inspect", inspect, "Show what a model or checkpoint holds, and how it converts."),
    ("plan", plan, "Show what a conversion will do, and what each rank of a cluster will hold."),
    ("import", import_command, "Hugging Face model to Megatron checkpoint."),
    ("export", export_command, "Megatron checkpoint to Hugging Face model."),
    ("verify", verify, "Compare two checkpoints, tensor by tensor, bit by bit."),
    ("compare", compare, "Compare transformers with Megatron-Core on one prompt."),
    ("make-model", make_model, "Make a small random model in the released layout."),
)


class _Command(TyperCommand):
    """A command with the arguments as manuals write them in its usage: SRC, not typer's {SRC}."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


for _name, _command, _summary in _COMMANDS:
    app.command(_name, cls=_Command, short_help=_summary, epilog=_EPILOG)(guarded(_command))

command = typer.main.get_command(app)
"""What `main` calls: made once, however often it is called."""
