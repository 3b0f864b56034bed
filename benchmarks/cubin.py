"""What a compiled kernel costs, read from its cubin with the cuobjdump that Triton's wheel carries."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

_FUNCTION = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Cubin:
    """Numbers of one cubin; the largest of its functions counts."""

    registers: int  # a thread
    spills: int  # bytes of local memory a thread: registers that did not fit
    hgmma: int  # warpgroup matrix instructions, Hopper's way to its full rate


def inspect(cubin: bytes) -> Cubin:
    """Disassemble `cubin`. Raises `subprocess.CalledProcessError` if cuobjdump cannot read it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = [{k: int(v) for k, v in m.groupdict().items()} for m in _FUNCTION.finditer(text)]
    if not functions:
        raise ValueError(f"cannot read the cubin: cuobjdump lists no function in it\n{text[:2000]}")
    return Cubin(
        registers=max(f["registers"] for f in functions),
        spills=max(f["stack"] + f["local"] for f in functions),
        hgmma=len(re.findall(r"\bHGMMA\b", text)),
    )
