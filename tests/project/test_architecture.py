"""docs/design/architecture.md is true to the code: its drawings, its contracts, its steps."""

import ast
import re
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import megatron.bridge.errors

SOURCE = Path(megatron.bridge.errors.__file__).parent
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design" / "architecture.md").read_text("utf-8")
BRIDGE = "megatron.bridge."
# Where users of other bridges, and scripts, look for something -> where it is.
ALIASES = {
    "checkpoint.torch_dist_reader": "formats.torch_dist.reader",
    "models.conversion.auto_bridge": "auto_bridge",
    "models.conversion.boxes": "tensors.boxes",
    "training.config": "runtime.ddp_config",
}


def _modules() -> dict[str, Path]:
    """Path by dotted name within the package; a folder by its __init__."""
    names = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """All of a module, those within functions too; what only a type checker sees is none."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            yield node
        else:
            yield from _imports(node)


def _graph() -> dict[str, set[str]]:
    """Module -> what it imports of the package."""
    modules = _modules()
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for node in _imports(ast.parse(path.read_text("utf-8"))):
            module = node.module or ""
            if not module.startswith(BRIDGE):
                continue
            module = module.removeprefix(BRIDGE)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in modules else module)
        graph[name] = found - {name}
    return graph


GRAPH = _graph()


def _drawing(number: int) -> list[list[str]]:
    """The names in each line of a drawing, from the top."""
    block = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)[number]
    # Names stand at most three blanks apart, what is said of them further to the right.
    return [re.split(r" {4,}", line.strip())[0].split() for line in block.splitlines()]


def _inner(folder: str) -> set[str]:
    path = SOURCE / folder
    return {
        child.stem
        for child in path.iterdir()
        if child.suffix == ".py" or (child / "__init__.py").exists()
    } - {"__init__", "__main__"}


def test_the_drawing_shows_all_folders_in_the_order_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contract = contracts["tool"]["importlinter"]["contracts"][0]
    drawing = _drawing(0)
    assert [line.split(" : ") for line in contract["layers"]] == drawing
    assert {name for line in drawing for name in line} == _inner(".")


@pytest.mark.parametrize(("number", "folder"), [(0, ""), (1, "models.")])
def test_nothing_looks_up(number: int, folder: str) -> None:
    floor = {name: depth for depth, line in enumerate(_drawing(number)) for name in line}
    seen = set()
    for module, imported in GRAPH.items():
        if module in ALIASES or not module.startswith(folder):
            continue
        own = module.removeprefix(folder).split(".")[0]
        for other in imported:
            if other.startswith(folder):
                theirs = other.removeprefix(folder).split(".")[0]
                if own in floor and theirs in floor:
                    seen.add((own, theirs))
                    assert floor[theirs] >= floor[own], f"{module} imports {other}"
    assert len(seen) >= len(floor), "nearly nothing was looked at"


def test_no_circles() -> None:
    TopologicalSorter(GRAPH).prepare()


STEPS = re.findall(r"^(\d+)\. `([\w/]+\.py): (\w+)`", PAGE, re.MULTILINE)


def _function(path: str, name: str) -> str:
    text = (SOURCE / path).read_text("utf-8")
    found = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert found, f"{path} has no {name}"
    return ast.get_source_segment(text, found[0]) or ""


def test_each_step_exists_and_is_called_by_one_before() -> None:
    assert [number for number, _, _ in STEPS] == [*"1234567", *"1234567", *"123456"]
    for place, (number, path, name) in enumerate(STEPS):
        _function(path, name)
        if number == "1":
            continue
        # Of the same way: back to its first step.
        begin = place - int(number) + 1
        before = [(SOURCE / p).read_text("utf-8") for _, p, _ in STEPS[begin:place]]
        called = re.compile(rf"(?<!def )\b{name}\(|\.{name}\b|\b{name},")
        assert any(called.search(text) for text in before), f"nobody before calls {path}: {name}"


NAMED = [
    (page.name, name)
    for page in sorted((ROOT / "docs" / "design").glob("*.md"))
    for name in sorted(set(re.findall(r"`([\w./]+\.py)\b", page.read_text("utf-8"))))
]


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_modules_that_a_page_names_exist(page: str, name: str) -> None:
    if name.startswith(("tests/", "examples/", "benchmarks/")):
        assert (ROOT / name).is_file()
    else:
        ends = [path for path in _modules().values() if path.as_posix().endswith(f"/{name}")]
        assert ends, f"{page}: there is no {name}"


def test_no_two_modules_have_one_name() -> None:
    """Commands aside, which are named as what one types."""
    seen: dict[str, Path] = {}
    for name, path in sorted(_modules().items()):
        if path.name == "__init__.py" or name.startswith("cli.commands.") or name in ALIASES:
            continue
        assert path.name not in seen, f"{seen[path.name]} and {path}"
        seen[path.name] = path


@pytest.mark.parametrize(("alias", "place"), ALIASES.items())
def test_an_alias_holds_nothing_of_its_own(alias: str, place: str) -> None:
    assert GRAPH[alias] == {place}
    there, here = import_module(BRIDGE + place), import_module(BRIDGE + alias)
    assert here.__all__
    for name in here.__all__:
        assert getattr(here, name) is getattr(there, name)
    assert not [module for module, imported in GRAPH.items() if alias in imported]


def test_the_readme_links_to_the_page() -> None:
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    assert any("docs/design/architecture.md" in text for text in texts)
