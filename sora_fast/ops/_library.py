"""The compiled libraries beside this package: whether they are there, and loaded where they are first asked for.

`python -m sora_fast.ops._library` prints what was built when the package was installed, and what was not.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
RECORD = _PACKAGE / "built.txt"
# What the libraries have a backend for.
OPS = ("patch_embed", "unpatchify", "linear_unpatchify")


def said() -> list[str]:
    """A line for each library, as the installation wrote them: what built it, or why it is not there."""
    if not RECORD.exists():
        return ["nothing was built: the package was not installed by pip, or is older than its source"]
    return RECORD.read_text().splitlines()


def file(name: str) -> Path:
    """Where the library `name` lies, or would."""
    return _PACKAGE / f"_{name}.abi3.so"


@cache
def missing(name: str) -> str | None:
    """Load the library `name`, "cpu" or "cuda". None if it is there, else why it is not."""
    if name == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not for CUDA"
    if name == "cuda" and (reason := missing("cpu")) is not None:
        return reason  # which declares the ops that the other one has
    if not (library := file(name)).exists():
        built = next((line for line in said() if line.startswith(f"_{name}: ")), f"_{name}: {said()[0]}")
        return f"the package has no compiled library for it; {built}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


@cache
def function(name: str) -> Any:
    """An op of the libraries, by its name in csrc/ops.h: to call, not to trace."""
    return getattr(torch.ops.sora_fast_native, name).default


if __name__ == "__main__":
    print(*said(), sep="\n")
