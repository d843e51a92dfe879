"""The floors of the house: imports go down only, and heavy packages are loaded where they are used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Lowest first; packages on one line do not import each other.
FLOORS = (
    (
        "mirip_fast",
        "mirip_fast.errors",
        "mirip_fast.files",
        "mirip_fast.language",
        "mirip_fast.progress",
        "mirip_fast.config",
        "mirip_fast.settings",
        "mirip_fast.runtime",
        "mirip_fast.text",
    ),
    ("mirip_fast.data",),
    ("mirip_fast.features",),
    ("mirip_fast.models",),
    ("mirip_fast.training", "mirip_fast.evaluation"),
    ("mirip_fast.ranking",),
    # End-to-end training starts from a head-only run and leaves one: its data and scoring are shared.
    ("mirip_fast.finetune",),
    ("mirip_fast.serving",),
    ("mirip_fast.portfolio", "mirip_fast.label"),
    ("mirip_fast.api", "mirip_fast.estimator"),
    ("mirip_fast_cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("mirip_fast", "mirip_fast"), ("cli", "mirip_fast_cli")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    room = next(r for n in range(len(parts), 0, -1) if (r := ".".join(parts[:n])) in FLOOR_OF)
    if room == "mirip_fast" and len(parts) > 1:
        raise AssertionError(f"{module} stands on no floor: add it to FLOORS")
    return room


def imports_of(path: Path) -> set[str]:
    """Every module imported at run time, also inside functions; type-checking imports do not count."""
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            if node.level == 0 and node.module:
                found.add(node.module)

    Visitor().visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down_only(module: str) -> None:
    room = room_of(module)
    for imported in imports_of(modules()[module]):
        if not imported.startswith(("mirip_fast.", "mirip_fast_cli")) or room_of(imported) == room:
            continue
        other = room_of(imported)
        up = FLOOR_OF[other] > FLOOR_OF[room] or (
            FLOOR_OF[other] == FLOOR_OF[room] and FLOOR_OF[room] > 0
        )
        assert not up, f"{module} imports {imported}, which is not below it"


def test_one_module_imports_h5py() -> None:
    importers = {name for name, path in modules().items() if "h5py" in imports_of(path)}
    assert importers == {"mirip_fast.features.shards"}


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {name.rpartition(".")[0] for name, p in modules().items() if p.name != "__init__.py"}
    assert all(f'"{package}"' in text for package in packages if package)
