"""How a checkpoint holds matrices that lie transposed in the Hugging Face files."""

from typing import Literal

type Transposed = Literal["strides", "copy"]
"""As they lie there, with strides that say so; or turned, in the order of their elements."""

TRANSPOSED: tuple[Transposed, ...] = ("strides", "copy")
