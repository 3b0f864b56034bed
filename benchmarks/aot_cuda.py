"""Compile the CUDA C++ kernels of attention for Hopper, without a GPU, and inspect what came out.

    python -m benchmarks.aot_cuda [--check | --update] [--json FILE] [--kernel NAME ...]

Each form of a kernel is compiled by nvcc with the flags that the package is built with. Exit code 1 if one spills
registers, keeps anything on a stack, or if ptxas says that it has made products wait for each other (warnings C75xx).
Beneath stand the instructions of a warp in the loop over tiles, beside those of Triton's kernel of the same form, from
benchmarks/results/aot.json, for as many operations: of tiles that are met entirely, and of those that must be asked.

--check compares with benchmarks/results/aot_cuda.json and exits with 1 if something has changed; under another nvcc
than the file's it says so and compares nothing. --update rewrites the file, or of it what --kernel names.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from benchmarks import _checkout, cubin
from benchmarks._checkout import ROOT
from benchmarks.hot_loop import Loop, aligned, read_loops
from benchmarks.pipes import Product, access_bytes
from benchmarks.sass import Flow, Instruction, functions
from benchmarks.snapshot import FILE as TRITON_FILE
from benchmarks.snapshot import Snapshot

FILE = ROOT / "benchmarks" / "results" / "aot_cuda.json"
# The warps that compute; those that load have their own loops, without products.
_CONSUMERS = 8
_MASKS = {"full": "full", "boxes": "window", "causal_boxes": "token_causal"}  # and Triton's case of the same kind
_WIDTHS = (64, 80, 96, 128)


@dataclass(frozen=True)
class Form:
    """A kernel of csrc/cuda/attention_kernels.cuh for bf16; that for fp16 differs in the type of its products alone."""

    kernel: str
    parameters: str
    mask: str
    width: int

    @property
    def name(self) -> str:
        return f"{self.kernel}[{self.mask},D{self.width}]"

    @property
    def source(self) -> str:
        """The one instance of the template that is compiled."""
        return (
            '#include "cuda/attention_kernels.cuh"\n'
            f"template __global__ void hopper::{self.kernel}_kernel<hopper::bf16, hopper::Mask::{self.mask}, "
            f"{self.width}>(const __grid_constant__ hopper::{self.parameters}<hopper::bf16>);\n"
        )


_KERNELS = {
    "attention_forward": "AttentionForward",
    "attention_backward_query": "AttentionBackward",
    "attention_backward_key_value": "AttentionBackward",
}
FORMS = [
    Form(name, parameters, mask, width)
    for (name, parameters), mask, width in product(_KERNELS.items(), _MASKS, _WIDTHS)
]


@dataclass(frozen=True)
class Compiled:
    """registers: a thread's at launch. budgets: those that a warp then takes or keeps → the most that its code names.
    spills, stack: bytes a thread. tma: loads of the tensor memory accelerator."""

    name: str
    registers: int
    budgets: Mapping[str, int]
    spills: int
    stack: int
    warnings: tuple[str, ...]
    instructions: int
    products: Mapping[str, int]
    tma: int
    loops: tuple[Loop, ...]

    @staticmethod
    def of(content: dict) -> "Compiled":
        """From what `asdict` makes of one."""
        loops = tuple(Loop(**loop) for loop in content["loops"])
        return Compiled(**{**content, "warnings": tuple(content["warnings"]), "loops": loops})

    @property
    def problem(self) -> str:
        found = [*self.warnings]
        found += [f"{used} registers of {size}" for size, used in self.budgets.items() if used > int(size)]
        if self.spills or self.stack:
            found.append(f"spills {self.spills} bytes a thread, and has a stack of {self.stack}")
        return "; ".join(found)


def compile_form(form: Form, sources: Path = ROOT / "csrc") -> Compiled:
    """Raises csrc.build.Unavailable where nvcc is not, RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "form.cu"), Path(folder, "form.cubin")
        source.write_text(form.source)
        nvcc, *flags = _nvcc()
        command = [nvcc, f"-I{sources}", *flags, "--cubin", "-o", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{form.name} does not compile:\n{done.stderr[:2000]}")
        text = cubin.disassemble(target.read_bytes())
    return read(form.name, done.stderr, text)


def _nvcc() -> tuple[str, ...]:
    """As the package is built."""
    from csrc import build

    return *build.Toolchain.of(build.CUDA).compile, *build.gencode("9.0a"), "-Xptxas=-v"


def version() -> str:
    """Of nvcc."""
    said = subprocess.run([_nvcc()[0], "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d[\d.]*)", said)[1]


def read(name: str, said: str, text: str) -> Compiled:
    """said: by ptxas -v; text: by `cuobjdump -res-usage -sass`."""
    code = [instruction for function in functions(text) for instruction in function]
    matrix = [Product.of(i) for i in code if i.op == "HGMMA"]
    stack, spills = _most(r"(\d+) bytes stack frame", said), _most(r"(\d+) bytes spill stores", said)
    return Compiled(
        name,
        registers=_most(r"Used (\d+) registers", said),
        budgets=dict(_budget(*pair) for function in functions(text) for pair in Flow(function).behind("USETMAXREG")),
        spills=spills,
        stack=stack,
        warnings=tuple(sorted(set(re.findall(r"\((C75\d\d)\)", said)) | set(re.findall(r"setmaxnreg ignored", said)))),
        instructions=sum(i.op != "NOP" for i in code),
        products=dict(Counter(f"{product.shape}" for product in matrix if product)),
        tma=sum(i.op == "UTMALDG" for i in code),
        loops=tuple(loop for loop in read_loops(text, warps=_CONSUMERS, target="sm_90") if loop.products),
    )


def _budget(instruction: Instruction, code: Sequence[Instruction]) -> tuple[str, int]:
    """The registers that are set for a warp, and how many the code behind needs."""
    size = int(re.findall(r"0x[0-9a-f]+", instruction.operands)[-1], 16)
    return str(size), 1 + max(map(_last_register, code), default=-1)


def _last_register(instruction: Instruction) -> int:
    """-1: none. Operands name the first of several: accumulators, and up to four words of memory."""
    named = [int(number) for number in re.findall(r"\bR(\d+)\b", instruction.operands)]
    if not named:
        return -1
    product = Product.of(instruction) if instruction.op == "HGMMA" else None
    if product:
        return max(named[0] + product.n // 2 - 1, *named)
    return max(named) + access_bytes(instruction) // 4 - 1


def _most(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def beside_triton(rows: Iterable[Compiled]) -> Iterator[tuple[str, ...]]:
    """A line a forward form: instructions of a warp in a step over a tile, ours and Triton's for as many operations.

    Ours has one loop for both kinds of tiles. What a partial one takes beside the whole ones is on paths that an
    iteration may leave out; less what the same paths hold in the full mask's form, the tail of a segment.
    """
    ours = {row.name: row for row in rows}
    triton = Snapshot.read(TRITON_FILE)
    theirs = {row.kernel: row for row in triton.rows if row.target == "sm_90"} if triton else {}
    for mask, width in product(_MASKS, _WIDTHS):
        row, full = (ours.get(f"attention_forward[{kind},D{width}]") for kind in (mask, "full"))
        if not row or not full or not row.loops or not full.loops:
            continue
        loop = row.loops[0]
        asked = loop.instructions + loop.sometimes - full.loops[0].sometimes if mask != "full" else None
        other = theirs.get(f"packed_attention[{_MASKS[mask]},D{width}]/packed_attention_forward_kernel")
        scaled = [_scaled(x, loop) for x in other.loops] if other and other.loops else []
        cells = [loop.instructions, asked, *[*scaled, None, None][:2]]
        yield row.name, *("-" if cell is None else str(cell) for cell in cells)


def _scaled(theirs: Loop, ours: Loop) -> int:
    """A warp's instructions, had each of as many warps as ours the same work."""
    return round(theirs.instructions * theirs.warps / theirs.flops * ours.flops / ours.warps)


_HEAD = ("kernel", "registers", "then", "spills", "stack", "instructions", "tma", "products")


def table(rows: Sequence[Compiled]) -> str:
    lines = [
        (
            row.name,
            str(row.registers),
            " ".join(f"{used}/{size}" for size, used in row.budgets.items()),
            *map(str, (row.spills, row.stack, row.instructions, row.tma)),
            " ".join(f"{count}×{shape}" for shape, count in row.products.items())
            + (f"  ← {row.problem}" * bool(row.problem)),
        )
        for row in rows
    ]
    steps = list(beside_triton(rows))
    head = ("instructions of a step", "whole tile", "partial tile", "Triton, whole", "Triton, partial")
    return f"{aligned(_HEAD, lines, left=1)}\n\n{aligned(head, steps, left=1)}"


def differences(before: Iterable[Compiled], after: Iterable[Compiled]) -> Iterator[str]:
    """A line for each form that is new, gone or other than it was."""
    old, new = ({row.name: asdict(row) for row in rows} for rows in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            yield f"{name}: {'vanished' if name in old else 'new'}"
        elif old[name] != new[name]:
            changed = [key for key in new[name] if new[name][key] != old[name][key]]
            yield f"{name}: {', '.join(f'{key} {old[name][key]} → {new[name][key]}' for key in changed)}"[:400]


def load(file: Path) -> tuple[str, list[Compiled]]:
    """The version of nvcc, and the rows; none where there is no file."""
    content = json.loads(file.read_text()) if file.exists() else {"nvcc": "", "rows": []}
    return content["nvcc"], [Compiled.of(row) for row in content["rows"]]


def save(file: Path, nvcc: str, rows: Iterable[Compiled]) -> None:
    lines = [json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: row.name)]
    file.write_text(f'{{"nvcc": {json.dumps(nvcc)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    from csrc.build import Unavailable
    from sora_fast.arguments import path

    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot_cuda", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="name what differs from the snapshot in the repository")
    what.add_argument("--update", action="store_true", help="rewrite that snapshot: the differences are intended")
    parser.add_argument("--json", type=path, help="also write the rows to this file")
    parser.add_argument("--kernel", nargs="+", default=[""], metavar="NAME", help="only names that contain this")
    options = parser.parse_args(arguments)
    chosen = {form.name: form for form in FORMS if any(part in form.name for part in options.kernel)}
    try:
        here = version()
    except Unavailable as reason:
        parser.error(str(reason))
    known, snapshot = load(FILE)
    if options.check and known != here:
        print(f"not compared: the snapshot is of nvcc {known or 'none'}, this is {here}")
        return 0
    rows = []
    for name, form in chosen.items():
        print(f"compiling {name}", file=sys.stderr)
        rows.append(compile_form(form))
    print(table(rows))
    if options.json:
        save(options.json, here, rows)
    if options.update:
        kept = [row for row in snapshot if row.name not in chosen] if known == here else []
        save(FILE, here, [*kept, *rows])
    changes = list(differences((row for row in snapshot if row.name in chosen), rows)) if options.check else []
    if changes:
        print("changed since the snapshot (if intended: the same command with --update):", *changes, sep="\n")
    return 1 if changes or any(row.problem for row in rows) else 0


if __name__ == "__main__":
    _checkout.make_importable()
    sys.exit(main())
