"""Whether a target shares blocks with what it is made of."""

from typing import Literal

type Reflink = Literal["auto", "always", "never"]
"""Where it can be done; or else it is an error; or not at all."""

REFLINK: tuple[Reflink, ...] = ("auto", "always", "never")
