"""Imports point one way: from what is built to what it is built on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The parts of the package, the lowest first; a part imports itself and those before it.
PARTS = (
    "arguments",
    "files",
    "memory",
    "nvml",
    "masks",
    "packing",
    "graphs",
    "schedule",
    "kernels",
    "ops",
    "proof",
    "nn",
    "models",
    "diffusion",
    "integrations",
    "media",
    "training",
    "generation",
    "demo",
    "report",
    "doctor",
    "cli",
)


def _sources() -> Iterator[tuple[str, Path]]:
    """(part, file) of everything that is shipped; what `sora_fast/__init__.py` offers is taken from any part."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path
    for path in sorted((ROOT / "sora_fast").rglob("*.py")):
        if path != ROOT / "sora_fast" / "__init__.py":
            yield path.relative_to(ROOT / "sora_fast").parts[0].removesuffix(".py"), path


def _imported_parts(path: Path) -> set[str]:
    """Parts that a file imports, inside functions too, but not for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("sora_fast.")}


def test_imports_point_one_way() -> None:
    wrong = []
    for part, path in _sources():
        above = _imported_parts(path) - set(PARTS[: PARTS.index(part) + 1])
        wrong += [f"{path.relative_to(ROOT)} imports sora_fast.{name}" for name in sorted(above)]
    assert not wrong


def test_masks_know_nothing_of_what_is_built_on_them() -> None:
    text = (ROOT / "sora_fast" / "masks.py").read_text()
    assert "sora_fast" not in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE)
