"""For any bytes a reader gives a valid result or raises CheckpointError, and nothing else.

What is checked of a result is written in `targets`. The same inputs are tried in every run; `make
fuzz` looks further.
"""

from __future__ import annotations

import copy
import json
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import targets
from fuzz.mutation import PICKLES, VALUES, damaged, json_text, spliced
from megatron.bridge.errors import BridgeError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.boxes import tiling_faults
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.strict_json import parse_object
from released_configs import CONFIGS
