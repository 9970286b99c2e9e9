"""Who may import whom: every import statement under evokernels/ against one table."""

import ast
import pathlib
import subprocess
import sys

import pytest

import evokernels

PACKAGE = pathlib.Path(evokernels.__file__).parent
PUBLIC = "evokernels"  # evokernels/__init__.py

# Layer → what it may import besides itself and the standard library. A layer is a module or a
# package directly under evokernels/, named without it; the rest are distributions.
MAY_IMPORT = {
    "errors": set(),
    "console": {"errors"},
    "document": {"errors"},
    "genome": {"document", "errors"},
    "architecture": {"document", "errors"},
    "zoo": {"genome", "architecture", "errors"},
    "compiler": {"genome", "errors", "numpy"},
    "terms": {"compiler", "genome", "errors", "numpy"},
    "kernels": {"compiler", "errors", "numpy", "torch", "triton", "cuda"},
    "optim": {"kernels", "compiler", "genome", "errors", "numpy", "torch"},
    "es": {"optim", "kernels", "errors", "numpy", "torch"},
    "explain": {"kernels", "compiler", "genome", "errors", "torch"},
    "inspection": {"explain", "kernels", "compiler", "genome", "torch"},
    "__main__": {
        *("inspection", "terms", "zoo", "compiler", "console", "document", "genome", "errors"),
        "torch",
    },
    "tasks": {"kernels", "architecture", "errors", "numpy", "torch", "torchvision"},
    "search": {"genome", "architecture", "errors", "zoo", "numpy"},
    "evolution": {
        *("search", "optim", "tasks", "compiler", "genome", "architecture", "zoo", "errors"),
        *("document", "torch", "numpy", "matplotlib", "tqdm", "pytorch_optimizer", "ray"),
        *("jinja2", "tensorboard"),
        "terms",  # for what runs leave behind: Python that registers them
        "kernels",  # whether a worker has a C compiler
    },
    # public names and nothing else, so nothing from outside
    PUBLIC: {
        *("errors", "genome", "architecture", "zoo", "compiler", "kernels", "optim", "explain"),
        "terms",
        *("es", "tasks", "search", "evolution"),
    },
}

WITHOUT_TORCH = ["compiler", "search", "terms"]


def layer_of(module):
    """The layer of a dotted name, for modules of the package and others alike."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] or PUBLIC if top == PUBLIC else top


def is_module(name, root):
    path = root.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(source, module, is_package, root=PACKAGE):
    """(line, dotted name) of everything a module imports, wherever in its text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from evokernels import zoo` imports the module zoo, not a name of the public API
                name = f"{base}.{alias.name}"
                yield (
                    node.lineno,
                    name if layer_of(base) == PUBLIC and is_module(name, root) else base,
                )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            name = node.args[0] if node.args else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) else "<unknown>"


def forbidden(source, module, is_package=False):
    layer = layer_of(module)
    allowed = MAY_IMPORT.get(layer, set()) | {layer} | set(sys.stdlib_module_names)
    return [
        f"{module}:{line} imports {name}"
        for line, name in imported(source, module, is_package)
        if layer_of(name) not in allowed
    ]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), path, is_package


MODULES = list(modules())


@pytest.mark.parametrize(("module", "path", "is_package"), MODULES, ids=[m for m, _, _ in MODULES])
def test_every_import_is_in_the_table(module, path, is_package):
    assert layer_of(module) in MAY_IMPORT, f"add {layer_of(module)} to the table, and say why"
    assert forbidden(path.read_text(encoding="utf-8"), module, is_package) == []


def test_every_row_of_the_table_is_a_layer():
    assert {layer_of(module) for module, _, _ in MODULES} == set(MAY_IMPORT)


# (module, whether it is a package's __init__, an import that it must not have)
PLANTED = [
    ("evokernels.genome", False, "import torch"),
    ("evokernels.genome", False, "import os, torch.nn as nn"),
    ("evokernels.genome", False, "def f():\n    from torch import nn"),
    ("evokernels.genome", False, "if TYPE_CHECKING:\n    import numpy"),
    ("evokernels.genome", False, "try:\n    import numpy as np\nexcept ImportError:\n    pass"),
    ("evokernels.genome", False, "class A:\n    import evokernels.compiler.lower"),
    ("evokernels.errors", False, "from evokernels.genome import Genome"),
    ("evokernels.errors", False, "from evokernels import genome"),
    ("evokernels.genome", False, "from evokernels import Genome"),
    ("evokernels.genome", False, "import evokernels"),
    ("evokernels.genome", False, "from . import zoo"),
    ("evokernels.genome", False, "from .zoo import adam"),
    ("evokernels.genome", False, "from . import *"),
    ("evokernels.compiler.lower", False, "from .. import optim"),
    ("evokernels.compiler.lower", False, "from ..kernels.plan import ARITHMETIC"),
    ("evokernels.compiler", True, "from ..kernels.plan import ARITHMETIC"),
    ("evokernels.compiler", True, "from .. import zoo"),
    ("evokernels.compiler.lower", False, "import importlib\nimportlib.import_module('torch')"),
    ("evokernels.compiler.lower", False, "import_module('torch')"),
    ("evokernels.compiler.lower", False, "__import__('torch')"),
    ("evokernels.compiler.lower", False, "__import__('tor' + 'ch')"),
    ("evokernels.search.genetic", False, "from evokernels.optim import FusedEvolvedOptimizer"),
    ("evokernels.kernels.cpu", False, "from evokernels.genome import Genome"),
    ("evokernels.es.strategy", False, "from evokernels import zoo"),
    ("evokernels.tasks.models", False, "from evokernels import evolution"),
    ("evokernels", True, "import torch"),
    ("evokernels.unheard_of", False, "import torch"),
]


@pytest.mark.parametrize(("module", "is_package", "source"), PLANTED)
def test_a_planted_import_is_found(module, is_package, source):
    assert len(forbidden(source, module, is_package)) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("evokernels.zoo", False, "from . import genome\nfrom .genome import Term\nimport math"),
        ("evokernels.compiler.lower", False, "from . import terms\nfrom .expr import Expr"),
        ("evokernels.compiler", True, "from . import terms\nfrom .expr import Expr"),
        (
            "evokernels.compiler.lower",
            False,
            "from .. import genome\nfrom ..errors import GenomeError",
        ),
        ("evokernels.evolution.run", False, "from evokernels import zoo\nimport torch.nn"),
        ("evokernels", True, "from . import zoo\nfrom .optim import FusedEvolvedOptimizer"),
    ],
)
def test_allowed_imports_are_not_found(module, is_package, source):
    assert forbidden(source, module, is_package) == []


# Imports what it is told to while torch cannot be imported. A stand-in for the package leaves
# evokernels/__init__.py out, as setup.py does.
IMPORT_WITHOUT_TORCH = """
import importlib, sys, types

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, NoTorch())
package = types.ModuleType("evokernels")
package.__path__ = [sys.argv[1]]
sys.modules["evokernels"] = package
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def import_without_torch(names):
    return subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, str(PACKAGE), *names],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_compiler_and_search_import_without_torch():
    names = [module for module, _, _ in MODULES if layer_of(module) in WITHOUT_TORCH]
    assert {layer_of(name) for name in names} == set(WITHOUT_TORCH)
    result = import_without_torch(names)
    assert result.returncode == 0, result.stderr


def test_torch_is_really_blocked_there():
    result = import_without_torch(["evokernels.kernels.plan"])
    assert "ImportError: torch is blocked" in result.stderr
