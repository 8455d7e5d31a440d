"""The house's floors: every import points down, and some rooms stay clear of jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mdpo_jax"
FLOOR = {
    "train": 6, "evaluate": 6, "export": 6, "report": 6, "grade": 6, "execute": 6,
    "doors": 5.5,
    "pipeline": 5,
    "training": 4, "rollout": 4,
    "data": 3, "model": 3,
    "reporting": 2, "grading": 2, "environment": 2, "chat": 2, "recipes": 2,
    "hosts": 1, "objectives": 1, "isolation": 1, "config": 1, "types": 1, "rows": 1,
    "methods": 0, "endpoints": 0.5, "exploration": 0.5, "learning": 0.5, "smoke": 1.5, "checks": 0,
    "host_memory": 0, "products": 0,
}  # fmt: skip
NO_JAX = (
    "isolation",
    "environment",
    "grading",
    "types",
    "rows",
    "config",
    "learning",
    "smoke",
    "methods",
    "recipes",
    "chat",
    "data",
    "reporting",
)


def rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdpo_jax"):
            names = [node.module]
            if node.module == "mdpo_jax":
                names = [f"mdpo_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("mdpo_jax")]
        found |= {name.split(".")[1] for name in names if "." in name}
    return found


def files():
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in rooms(path) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def test_model_and_objectives_do_not_know_each_other():
    for path in files():
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("model", "objectives"):
            assert not rooms(path) & ({"model", "objectives"} - {room})


@pytest.mark.parametrize("room", NO_JAX)
def test_room_imports_no_jax(room):
    folder = PACKAGE / room
    modules = (
        [f"mdpo_jax.{room}.{p.stem}" for p in folder.glob("*.py") if p.stem != "symbolic"]
        if folder.is_dir()
        else [f"mdpo_jax.{room}"]
    )
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
