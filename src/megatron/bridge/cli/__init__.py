"""The command `megatron-bridge`: what a person types.

app          the commands, declared; importing it imports none of them
commands     one file per command or pair: arguments in, computing called, result shown
parameters   options and arguments that several commands share
render       reports as tables; `text.document` has them as JSON
outcome      errors as messages and exit statuses
output       where results, messages and progress go
"""

from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the arguments without the program's name; None for those of the process.

    Returns:
        The exit status: 0 if it is done, 1 if two things differ, 2 if the input cannot be used;
        `megatron.bridge.cli.outcome` lists the others.
    """
    import sys

    from click import ClickException
    from click.exceptions import Exit

    from megatron.bridge.cli.outcome import INTERRUPTED, misused, terminable, unprinted
    from megatron.bridge.cli.streams import sturdy_streams

    given = sys.argv[1:] if args is None else list(args)
    for_good = args is None
    with sturdy_streams(for_good=for_good):
        try:
            with terminable(for_good=for_good):
                from megatron.bridge.cli.app import commands

                with commands.make_context("megatron-bridge", [*given]) as context:
                    commands.invoke(context)
                return 0
        except Exit as end:
            return end.exit_code
        except ClickException as error:
            return misused(error, as_json="--json" in given)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:  # between the commands' own handling and here
            return INTERRUPTED
        except OSError as error:  # of a help or version that cannot be printed
            return unprinted(error)
