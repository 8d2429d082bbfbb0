"""The house: imports only point down, never in a circle; a module is read in one sitting, a function on a screen or two.
"""

import ast

import pytest

from conftest import ROOT

# From the ground up. A module may import from floors below its own, and within its own package.
FLOORS = [["errors"], ["files", "languages", "plots"], ["distributed"], ["settings"], ["models", "tokenizers"],
          ["weights", "generation", "data"], ["training", "evaluation"], ["demo"], ["building"],
          ["generate", "train_sft", "train_dpo", "eval"]]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
           for path in sorted([*ROOT.glob("minixllm/**/*.py"), *(ROOT / f"{door}.py" for door in FLOORS[-1][1:])])}


def imported(tree) -> set[str]:
    """The project's modules that a module imports, at its top or within a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minixllm"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(next((name for name in (inner, f"{inner}.__init__") if name in MODULES), node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("minixllm")}
    return {name if name in MODULES else f"{name}.__init__" for name in names}


def room(module: str) -> str:
    """The package of a module, or the module itself where it stands at the root."""
    return module.removeprefix("minixllm.").split(".")[0]


FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_point_down(module):
    for other in imported(MODULES[module]):
        if room(other) not in (room(module), "__init__"):
            assert FLOOR_OF[room(other)] < FLOOR_OF[room(module)], f"{module} imports {other}"


def test_no_module_imports_itself_by_a_detour():
    arrows, done = {module: imported(tree) - {module} for module, tree in MODULES.items()}, set()

    def follow(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(arrows[module]):
                follow(other, [*path, module])
            done.add(module)

    for module in MODULES:
        follow(module, [])


@pytest.mark.parametrize("module", list(MODULES))
def test_a_module_is_read_in_one_sitting(module):
    tree = MODULES[module]
    assert max([node.end_lineno for node in tree.body], default=0) <= 380
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_runtime_packages_are_five():
    """Whatever else is imported is imported where it is needed, and says which extra brings it."""
    import sys

    allowed = {"torch", "sentencepiece", "safetensors", "numpy", "tqdm", "minixllm"} | set(sys.stdlib_module_names)
    for module, tree in MODULES.items():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, module
