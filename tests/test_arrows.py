"""Who may import whom (`left may be imported by right`), and what is not loaded before it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adaptkit

PACKAGE = Path(adaptkit.__file__).parent

CORE = ("errors", "types", "registry", "config", "storage")
BELOW_THE_STUDIO = {
    *(*CORE, "backbones", "data", "methods", "training", "evaluation", "sweeps", "export", "estimator", "serving"),
}
MAY_IMPORT = {
    # the core files stand in a row; each may import those before it
    **{name: set(CORE[:position]) for position, name in enumerate(CORE)},
    "backbones": {*CORE},
    "data": {*CORE, "backbones"},
    "methods": {*CORE, "backbones"},  # design, section 3: a method never imports `data`
    "training": {*CORE, "backbones", "data", "methods"},
    "evaluation": {*CORE, "backbones", "data", "methods", "training"},
    "sweeps": {*CORE, "backbones", "data", "methods", "training", "evaluation"},
    "export": {*CORE, "backbones", "data", "methods", "training", "evaluation"},
    "estimator": {*CORE, "backbones", "data", "methods", "training", "evaluation", "sweeps", "export"},
    "serving": {*CORE, "backbones", "data", "methods", "training", "evaluation", "export", "estimator"},
    "studio": BELOW_THE_STUDIO,
    "commands": {*BELOW_THE_STUDIO, "studio"},
    "__main__": {"commands"},  # python -m adaptkit
}
EXPECTED_ROOMS = set(MAY_IMPORT)
HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "transformers",
    "timm",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "fastapi",
)

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


class Imports(ast.NodeVisitor):
    """Dotted names of all imports, also those inside functions and by `import_module("…")`; no TYPE_CHECKING blocks."""

    def __init__(self, package: str) -> None:
        self.package = package  # of the module, for relative imports
        self.found: list[str] = []

    def visit_If(self, node: ast.If) -> None:
        if not is_type_checking(node.test):
            return self.generic_visit(node)
        for below in node.orelse:
            self.visit(below)
        return None

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        self.found += [f"{base}.{alias.name}" for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.found.append(str(node.args[0].value))
        self.generic_visit(node)


def imports_of(source: str, package: str) -> list[str]:
    visitor = Imports(package)
    visitor.visit(ast.parse(source))
    return visitor.found


def package_of(path: Path) -> str:
    return ".".join(["adaptkit", *path.relative_to(PACKAGE).parent.parts])


def own_imports(path: Path) -> Iterator[str]:
    """First part after "adaptkit." of everything of ours that a file imports ("" for names of the package itself)."""
    for name in imports_of(path.read_text(encoding="utf-8"), package_of(path)):
        first, _, rest = name.partition(".")
        if first == "adaptkit":
            yield rest.split(".")[0]


def violations(room: str, targets: Iterator[str] | list[str]) -> list[str]:
    allowed = MAY_IMPORT[room] | {room, "__version__"}
    return [target for target in targets if target not in allowed]


# --- the checker itself -----------------------------------------------------------------------------------------------


def test_the_checker_sees_every_kind_of_import():
    source = """
import adaptkit.data.images
from adaptkit import evaluation, __version__
from adaptkit.methods.base import Method
from ..commands import main
from . import tower
from .tower import Tower
import importlib
if TYPE_CHECKING:
    from adaptkit.estimator import load
else:
    import adaptkit.sweeps
if typing.TYPE_CHECKING:
    import adaptkit.export
def late():
    import adaptkit.training.loop
    try:
        importlib.import_module("adaptkit.estimator")
    except ImportError:
        pass
class Body:
    from adaptkit.errors import ConfigError
"""
    found = [name for name in imports_of(source, "adaptkit.backbones") if name.startswith("adaptkit")]
    assert found == [
        "adaptkit.data.images",
        "adaptkit.evaluation",
        "adaptkit.__version__",
        "adaptkit.methods.base.Method",
        "adaptkit.commands.main",
        "adaptkit.backbones.tower",
        "adaptkit.backbones.tower.Tower",
        "adaptkit.sweeps",
        "adaptkit.training.loop",
        "adaptkit.estimator",
        "adaptkit.errors.ConfigError",
    ]
    rooms = [name.split(".")[1] for name in found]
    assert violations("backbones", rooms) == [
        "data",
        "evaluation",
        "methods",
        "commands",
        "sweeps",
        "training",
        "estimator",
    ]
    assert violations("methods", ["data"]) == ["data"]
    assert violations("commands", rooms) == []
    assert violations("errors", ["types"]) == ["types"]


# --- the arrows -------------------------------------------------------------------------------------------------------


def test_every_module_keeps_to_the_arrows():
    looked_at, rooms, wrong = 0, set(), []
    for path in SOURCES:
        if path == PACKAGE / "__init__.py":
            continue
        room = room_of(path)
        assert room in MAY_IMPORT, f"{path} is in a room that design.md, section 3, doesn't know"
        wrong += [f"{path.relative_to(PACKAGE)} imports {target!r}" for target in violations(room, own_imports(path))]
        looked_at += 1
        rooms.add(room)
    assert not wrong, "; ".join(wrong)
    assert rooms >= EXPECTED_ROOMS
    assert looked_at == len(SOURCES) - 1 >= 60


def test_methods_never_import_data():
    """Said on its own in the design, so checked on its own: not even for types."""
    looked_at = 0
    for path in (PACKAGE / "methods").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [module for module in modules if (module + ".").startswith("adaptkit.data.")], path
        looked_at += 1
    assert looked_at >= 16


def test_the_evaluation_room_knows_no_method():
    """It knows the interface: `methods` itself, `methods.base` and the adapters on disk."""
    families = {path.name for path in (PACKAGE / "methods").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert families >= {"adapters", "caches", "prompts"}
    looked_at = 0
    for path in (*(PACKAGE / "evaluation").glob("*.py"), *(PACKAGE / "training").glob("*.py")):
        for name in imports_of(path.read_text(encoding="utf-8"), package_of(path)):
            assert not (name.startswith("adaptkit.methods.") and name.split(".")[2] in families), f"{path}: {name}"
        looked_at += 1
    assert looked_at >= 8


def test_command_modules_load_nothing_heavy_at_their_top():
    looked_at = 0
    for path in (PACKAGE / "commands").glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for name in imports_of(ast.unparse(ast.Module(top, [])), "adaptkit.commands"):
            assert name.split(".")[0] not in (*HEAVY, "numpy", "PIL", "yaml"), f"{path}: {name}"
        looked_at += 1
    assert looked_at >= 4


# --- what is loaded when ----------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


REPORT = f"\nimport sys\nprint('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import adaptkit; assert 'FewShotClassifier' in dir(adaptkit) and adaptkit.AdaptKitError.__mro__",
        "import adaptkit.errors, adaptkit.types, adaptkit.registry, adaptkit.config, adaptkit.storage",
        "import adaptkit.backbones, adaptkit.data, adaptkit.methods, adaptkit.training, adaptkit.evaluation",
        "import adaptkit.commands.main",
    ],
    ids=["package", "core", "rooms", "command group"],
)
def test_importing_loads_nothing_heavy(code):
    assert "LOADED []" in run_python(code + REPORT)


def test_the_methods_are_listed_without_importing_one():
    out = run_python(
        "from adaptkit.methods import methods\n"
        "assert 'coop' in methods and all(methods.entry(name).summary for name in methods)\n"
        "import sys; print(len(methods), [name for name in sys.modules if name.startswith('adaptkit.methods.')])"
        + REPORT
    )
    assert int(out.split()[0]) >= 7
    assert out.split("\n")[0].endswith(" []"), out
    assert "LOADED []" in out


def test_help_loads_nothing_heavy():
    out = run_python(
        "from click.testing import CliRunner\n"
        "from adaptkit.commands.main import main, _VERBS\n"
        "result = CliRunner().invoke(main, ['--help'])\n"
        "assert result.exit_code == 0, repr(result.exception)\n"
        "assert all(verb in result.output for verb in _VERBS), result.output\n"
        "print(result.output)" + REPORT
    )
    assert "Adapt a frozen vision-language model" in out
    assert "LOADED []" in out


def test_public_names_are_all_there():
    assert set(adaptkit.__all__) == {*adaptkit._HOME, "__version__"}
    for name, home in adaptkit._HOME.items():
        assert Path(PACKAGE.parent, *home.split(".")).with_suffix(".py").is_file(), f"{name} lives in {home}"
        assert hasattr(adaptkit, name)
    assert len(adaptkit._HOME) >= 8
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        adaptkit.nonsense  # noqa: B018
