"""Building plans: every parameter of a model is looked up, checked and placed.

`build_plan` gathers all problems into one PlanError, before anything was written.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

from megatron.bridge.dtypes import MIXABLE, widest
from megatron.bridge.errors import PlanError
from megatron.bridge.models.conversion.diagnosis import Terms, find_causes
from megatron.bridge.models.conversion.extras import Extras
from megatron.bridge.models.conversion.layout import LayoutError
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry, Ranges
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.patterns import fill
from megatron.bridge.models.conversion.plan import ConversionPlan, Copy, Parameter, RowUse
from megatron.bridge.models.conversion.recipe import Recipe, RecipeBook
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.scales import NO_SCALES, lacks_scales
from megatron.bridge.tensors.boxes import Box, Shape
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.folding import join_numbers, split_numbers

NO_EXTRAS = Extras()
NO_TERMS = Terms()

_NEXT_STEP = "Check that config.json and the weights belong to one and the same model."


def expected_tensors(
    registry: MegatronMappingRegistry, structure: ModelStructure, dtype: Callable[[str], str]
) -> dict[str, TensorSpec]:
    """The Hugging Face tensors that a config asks for; `dtype` gives each one's by its name.

    Raises PlanError for rows that do not declare shapes.
    """
    specs: dict[str, TensorSpec] = {}
    for row, ranges in registry.expand(structure):
        for numbers in product(*ranges[: row.hf_wildcards]):
            for role, name in registry.hf_names(row, numbers).items():
                if role not in row.hf_symbols:
                    raise PlanError([f"{row.megatron_param}: the row declares no shape for {name}"])
                specs[name] = TensorSpec(name, structure.shape(row.hf_symbols[role]), dtype(name))
    return specs


def build_plan(
    registry: MegatronMappingRegistry,
    structure: ModelStructure,
    tensors: Mapping[str, TensorSpec],
    extras: Extras = NO_EXTRAS,
    terms: Terms = NO_TERMS,
) -> ConversionPlan:
    """The proven plan between `tensors` and the Megatron model of the same structure.

    tensors: what the Hugging Face side holds, by name; a TensorIndex or `expected_tensors`. Those
    that no row needs are carried; extras: what is known of them. terms: words for messages.
    A Megatron tensor has the dtype of the tensors that make it, or the narrowest that holds the
    values of all. Raises PlanError with every missing or misshapen tensor, and where there is no
    such dtype; its message is the cause.
    """
    return _Builder(registry, structure, tensors, extras, terms).build()


class _Tensors(NamedTuple):
    """The tensors that make one parameter, or the same part of all experts of a layer.

    names and shapes are by role, dtypes sorted and distinct.
    """

    names: dict[str, str]
    shapes: dict[str, Shape]
    dtypes: list[str]


class _Builder:
    def __init__(
        self,
        registry: MegatronMappingRegistry,
        structure: ModelStructure,
        tensors: Mapping[str, TensorSpec],
        extras: Extras,
        terms: Terms,
    ) -> None:
        self.extras = extras
        self.terms = terms
        self.carried = dict(extras.carried)
        self.equal = dict(extras.equal)
        self.registry = registry
        self.structure = structure
        self.hf = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()}
        self.problems: list[str] = []
        self.missing: dict[str, str] = {}
        self.used: set[str] = set()
        self.fits = True
        self.mixed = False
        self.unscaled: list[str] = []
        self.megatron: dict[str, TensorSpec] = {}
        self.parameters: list[Parameter] = []
        self.copies: list[Copy] = []
        self.padding: list[tuple[str, Box]] = []
        self.extra_states: list[str] = []
        self.rows: list[RowUse] = []

    def build(self) -> ConversionPlan:
        for row, ranges in self.registry.expand(self.structure):
            self._add(row, ranges)
        self._report_names()
        self.problems += self.unscaled
        if self.problems:
            raise self._refusal()
        plan = ConversionPlan(
            hf=self.hf,
            megatron=self.megatron,
            parameters=tuple(self.parameters),
            copies=tuple(self.copies),
            padding=tuple(self.padding),
            extra_states=tuple(self.extra_states),
            carried=self.carried,
            rows=tuple(self.rows),
            absent=self.extras.absent,
            equal=self.equal,
        )
        if faults := list(plan.faults()):
            raise PlanError(faults)
        return plan

    def _add(self, row: ParamMapping, ranges: Ranges) -> None:
        """All parameters of a row."""
        recipes = RecipeBook(row, self.structure)
        in_names, others = ranges[: row.hf_wildcards], ranges[row.hf_wildcards :]
        recipe = None
        for named in product(*in_names):
            tensors = self._look_up(row, named, others)
            if tensors is None:
                continue
            for other in product(*others):
                numbers = named + other
                try:
                    recipe = recipes.find(numbers, tensors.shapes)
                except LayoutError as error:
                    parameter = fill(row.megatron_param, numbers)
                    self.problems.append(f"{parameter} from {_names(tensors)}: {error}")
                else:
                    self._place(row, numbers, tensors, recipe)
        if recipe is not None:
            names = tuple(row.hf_params.values())
            self.rows.append(RowUse(row.megatron_param, names, recipe.layout, ranges))

    def _look_up(
        self, row: ParamMapping, named: tuple[int, ...], others: Ranges
    ) -> _Tensors | None:
        """The tensors with these numbers in their names, if they are there and as declared."""
        names = self.registry.hf_names(row, named)
        self.used.update(names.values())
        found = {role: self.hf[name] for role, name in names.items() if name in self.hf}
        good = len(found) == len(names)
        if not good:
            last = tuple(numbers[-1] for numbers in others)
            parameter = fill(row.megatron_param, named + last)
            for role, name in names.items():
                if role not in found:
                    self.missing[name] = parameter
        for role, symbols in row.hf_symbols.items():
            if role in found and self.structure.shape(symbols) != found[role].shape:
                good = self.fits = False
                self.problems.append(
                    f"{names[role]}: the config asks for shape {self.structure.shape(symbols)} "
                    f"[{symbols}], found {found[role].shape}"
                )
        for role, spec in found.items():
            if problem := lacks_scales(names[role], spec.dtype):
                good = False
                self.unscaled.append(problem)
        if not good:
            return None
        return _Tensors(
            names,
            {role: spec.shape for role, spec in found.items()},
            sorted({spec.dtype for spec in found.values()}),
        )

    def _place(
        self, row: ParamMapping, numbers: tuple[int, ...], tensors: _Tensors, recipe: Recipe
    ) -> None:
        """The copies of one parameter into each of its checkpoint keys."""
        name = fill(row.megatron_param, numbers)
        keys = self._keys(name, numbers, tensors, recipe)
        if keys is None:
            return
        for key, part in zip(keys, recipe.parts, strict=True):
            leading = part.placement.leading(numbers)
            self.parameters.append(Parameter(name, key, leading + part.box, row.megatron_param))
            for piece in part.pieces:
                hf_name, megatron_box = tensors.names[piece.role], leading + piece.megatron_box
                self.copies.append(
                    Copy(hf_name, piece.hf_box, key, megatron_box, piece.transpose, piece.offset)
                )
            if part.padding is not None:
                self.padding.append((key, leading + part.padding))
        if recipe.extra_state is not None:
            self.extra_states.append(recipe.extra_state.object_key(numbers))

    def _keys(
        self, name: str, numbers: tuple[int, ...], tensors: _Tensors, recipe: Recipe
    ) -> list[str] | None:
        """The checkpoint keys of one parameter, if its tensors and the other layers agree.

        A key has the narrowest dtype that holds the values of all its tensors.
        """
        # A constant added in BF16 would lose bits of the result: such parameters are kept in F32.
        dtype = widest(*tensors.dtypes, *(["F32"] if recipe.shifted else []))
        if dtype is None:
            self.mixed = True
            self.problems.append(
                f"{name}: {_names(tensors)} should have one dtype, or several of "
                f"{', '.join(MIXABLE)}; found {tensors.dtypes}; convert the files to one first"
            )
            return None
        keys = []
        for placement, *_ in recipe.parts:
            key, shape = placement.key_of(numbers), placement.key_shape
            known = self.megatron.get(key)
            if known is None:
                known = self.megatron[key] = TensorSpec(key, shape, dtype)
            shared = widest(known.dtype, dtype)
            if known.shape != shape or shared is None:
                self.mixed |= shared is None
                self.problems.append(
                    f"{name} from {_names(tensors)}: layers share the checkpoint tensor {key} of "
                    f"shape {known.shape} and dtype {known.dtype}, but this one needs shape "
                    f"{shape} and dtype {dtype}"
                )
                return None
            if shared != known.dtype:
                self.megatron[key] = replace(known, dtype=shared)
            keys.append(key)
        return keys

    def _report_names(self) -> None:
        self._look_for_needed()
        for name, other in self.extras.copies.items():
            if other.name in self.used and name not in self.carried:
                self.equal[name] = other
                self.carried[name] = f"a copy of {other.name}, which is the same parameter"
        unused = {name: None for name in self.hf if not (name in self.used or name in self.carried)}
        if self.fits and not self.missing:
            # Everything that the model needs is there: what is left lies beside it.
            self.carried |= {name: self.extras.reason(name) for name in unused}
            return
        self.fits = False
        renamed = _renamed(self.missing, unused)
        for name, parameter in self.missing.items():
            like = f"; was it renamed to {renamed[name]}?" if name in renamed else ""
            self.problems.append(f"{name}: missing, needed for {parameter}{like}")
        for name in unused:
            tensor = self.hf[name]
            self.problems.append(
                f"{name}: no row maps it (shape {tensor.shape}, dtype {tensor.dtype})"
            )

    def _look_for_needed(self) -> None:
        """Tensors that are carried, and without which the files would not be whole."""
        for name, (shape, purpose) in self.extras.needed.items():
            if name not in self.hf:
                self.missing[name] = purpose
            elif self.hf[name].shape != shape:
                self.fits = False
                self.problems.append(
                    f"{name}: the config asks for shape {shape}, found {self.hf[name].shape}"
                )

    def _refusal(self) -> PlanError:
        """All problems; the message says their cause, where there is one that explains them."""
        # All experts of a layer find the same fault in the tensor that they share.
        problems = list(dict.fromkeys(self.problems))
        if self.fits and self.unscaled:
            return PlanError(problems, heading=NO_SCALES)
        if self.fits:
            return PlanError(problems, causes=self._not_floating())
        unmapped = {name for name in self.hf if name not in self.used}
        causes, explained = find_causes(
            self.registry, self.structure, self.hf, self.terms, set(self.extras.needed)
        )
        if not causes:
            return PlanError(problems, next_step=_NEXT_STEP)
        rest = [
            problem
            for problem in problems
            if (name := problem.partition(": ")[0]) not in explained and name not in unmapped
        ]
        return PlanError(problems, causes=causes + rest)

    def _not_floating(self) -> list[str]:
        """Which tensors have dtypes that cannot be mixed with others; or nothing."""
        if not self.mixed:
            return []
        found = [name for name in self.hf if name in self.used and self._is_odd(name)]
        dtypes = sorted({self.hf[name].dtype for name in found})
        return [
            (
                f"{len(found)} of {len(self.used)} tensors are {' and '.join(dtypes)}, such as "
                f"{found[0]}, and cannot be mixed with others: convert the files to one dtype, or "
                f"several of {', '.join(MIXABLE)}"
            )
        ]

    def _is_odd(self, name: str) -> bool:
        return self.hf[name].dtype not in MIXABLE


def _renamed(missing: Iterable[str], unexpected: Collection[str]) -> dict[str, str]:
    """The name in the files that a missing tensor may have: alike, and with the same numbers."""
    patterns = {split_numbers(name)[0]: None for name in unexpected}
    alike = {"".join(words): words for words in patterns}

    @cache
    def closest(pattern: str) -> list[str]:
        return difflib.get_close_matches(pattern, alike, n=3, cutoff=0.8)

    found = {}
    for name in missing if alike else ():
        words, numbers = split_numbers(name)
        others = (alike[pattern] for pattern in closest("".join(words)))
        likely = (join_numbers(other, numbers) for other in others if len(other) == len(words))
        if hit := next((other for other in likely if other in unexpected), None):
            found[name] = hit
    return found


def _names(tensors: _Tensors) -> str:
    return ", ".join(tensors.names.values())
