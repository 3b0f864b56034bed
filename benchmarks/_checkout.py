"""Lets a checkout run without being installed: `sora_fast.kernels` is the folder kernels/ at its root."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class _KernelsFinder(MetaPathFinder):
    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "sora_fast.kernels":
            return None
        folder = ROOT / "kernels"
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def make_importable() -> None:
    """Let `sora_fast.kernels` be found at the root of this checkout, whatever is installed: that may be another one."""
    if _KernelsFinder not in sys.meta_path:
        sys.meta_path.insert(0, _KernelsFinder)
