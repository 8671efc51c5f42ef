"""Every error that the bridge raises on purpose.

    BridgeError
    ├── InputError               what was given cannot be used
    │   ├── ReferenceNotFound    no such folder, hub id or revision
    │   ├── ConfigError          a config value is missing, of the wrong type or contradictory
    │   ├── CheckpointError      files that are missing, damaged or unsafe to read
    │   │   └── SourceChanged    files that changed while they were converted
    │   ├── InexactCast          values that the dtype they are to have does not hold
    │   ├── UnsupportedModel     an architecture or option without a bridge
    │   └── TargetExists         the output is there already
    ├── PlanError                a conversion that is not proven: nothing was written
    └── MismatchError            two things that should be equal are not

A message names the culprit, what was expected, what was found and what to do next.
`exit_status` is what the command line returns: 2 for bad input, 1 for a mismatch.
"""

from collections.abc import Iterable
from typing import Self

from megatron.bridge.text.folding import listing


class BridgeError(Exception):
    """Base of all errors raised on purpose; `exit_status` is the command line's answer."""

    exit_status = 2
    problems: tuple[str, ...] = ()
    """Where there are several, each of them; the message has the first."""

    @classmethod
    def of_problems(cls, heading: str, problems: Iterable[str], more: Iterable[str] = ()) -> Self:
        """An error with these problems, its message as `listing` shows them under a heading.

        Args:
            heading: of the message.
            problems: those that the message shows.
            more: problems that the message passes over.
        """
        problems = tuple(problems)
        error = cls(f"{heading}:\n{listing(problems)}")
        error.problems = (*problems, *more)
        return error


class InputError(BridgeError):
    """What the caller gave cannot be used."""


class ReferenceNotFound(InputError):
    """No such folder, hub id or revision, or the hub cannot be reached."""


class ConfigError(InputError):
    """A config value is missing, of the wrong type or contradicts another."""


class CheckpointError(InputError):
    """Checkpoint files are missing, damaged, contradictory or unsafe to read."""


class SourceChanged(CheckpointError):
    """Files that a conversion reads are not those that it began with."""


class InexactCast(InputError):
    """Values that the dtype they are to have does not hold exactly."""


class UnsupportedModel(InputError):
    """No bridge is registered for this architecture or option."""


class TargetExists(InputError):
    """The output exists already and overwriting was not asked for."""


class PlanError(BridgeError):
    """The plan is not a proof: all problems of the run, gathered; nothing was written.

    `problems` are all of them, one by one; the message has them as `listing` does, or in their
    place the causes that explain them, and at its end the next step, if it is the same for all.
    """

    def __init__(
        self,
        problems: Iterable[str],
        *,
        heading: str = "the conversion is not proven",
        causes: Iterable[str] = (),
        next_step: str = "",
    ) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = f"{heading}: {count} problem{'' if count == 1 else 's'}"
        parts = [heading, listing(tuple(causes) or self.problems), next_step]
        super().__init__("\n".join(part for part in parts if part))


class MismatchError(BridgeError):
    """Two things that should be equal are not."""

    exit_status = 1
