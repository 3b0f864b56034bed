"""What a kernel's innermost loops cost, read from its machine code: bounds, not measurements.

    python -m benchmarks.hot_loop FILE ... --warps 8 [--target sm_90]

FILE: a cubin, or what `cuobjdump -sass` prints of one. Of a kernel with matrix instructions, each innermost loop that
holds some is read, in the order of the code (of packed attention: first the blocks that are met entirely, then those
that must be asked). Of any other, the loop that loads and stores most of global memory or, without one, all of it.

The bound is the share of the peak rate that is left if every pipe works without a gap and all of them at once: the
work that the source asks for at the peak, over the cycles of the pipe that needs most. A kernel may well stay below it,
because it waits; it cannot be above it, as far as the rates are right. Instructions on paths that an iteration may
leave out are counted apart and take no part in the bound. All warps are taken to run the loop: of a specialised kernel,
give those of its consumers.

That leaves open whether the work can overlap. `alone` is the share of the peak that one warpgroup reaches with a
multiprocessor to itself, where only its own waits keep its products and the rest of its work apart: about 60% for a
loop in the manner of FlashAttention-2, which leaves the gaps to the other warpgroups, and nearly all of it where, as in
FlashAttention-3, the exponentials run beside the next products. With n warpgroups on a multiprocessor no more than
n times that can be reached.

What the source asks for stands in Triton's .ttir, which its cache keeps beside a cubin. Without it, the work is what
the matrix instructions do: more than was asked for where warps do the same twice.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _checkout, cubin
from benchmarks.pipes import MATRIX_OPS, RATES, Product, Rates, access_bytes, cycles
from benchmarks.sass import Code, Flow, Instruction, functions
from benchmarks.timeline import cycles_alone
from benchmarks.ttir import loop_flops

_LOADS = frozenset({"LDG", "LDGSTS"})
_STORES = frozenset({"ATOMG", "RED", "REDG", "STG"})


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop; all counts are a warp's, but for flops and cycles: those of a block.

    flops: that the source asks for. done: how often the matrix instructions do them; more than 1 where warps do the
    same twice or the compiler has unrolled the loop; None if that is not known. products: matrix instructions,
    "HGMMA 64x128x16" → how many. waits: for matrix instructions under way. barriers: of the block. local: loads and
    stores of registers that did not fit. loaded, stored: bytes of global memory a thread. behind: those that it asks
    for only after a barrier. in_flight: the most that it has asked for before it needs the first of them. cycles: pipe
    → what it needs at least. bound: share of the peak rate, None if the loop has no products or their rate is not
    known; binding: the pipe that sets it. alone: the share that one warpgroup by itself reaches at most; None if not
    all products are Hopper's.
    """

    warps: int
    instructions: int
    sometimes: int
    flops: int
    done: float | None
    products: Mapping[str, int]
    waits: int
    barriers: int
    local: int
    loaded: int
    stored: int
    behind: int
    in_flight: int
    cycles: Mapping[str, int]
    bound: float | None
    binding: str
    alone: float | None

    @property
    def per_megaflop(self) -> float | None:
        """Instructions of the block's warps."""
        return self.instructions * self.warps / (self.flops / 1e6) if self.flops else None

    @property
    def narrowest(self) -> int | None:
        """Least N of its matrix instructions; below 64, Hopper's do not reach their rate with both operands in shared
        memory."""
        return min((int(shape.split("x")[1]) for shape in self.products if "x" in shape), default=None)


def read_loops(text: str, *, warps: int, target: str, asked: Sequence[int] = ()) -> list[Loop]:
    """text: from `cuobjdump -sass`; warps: of a block; target: "sm_90"; asked: `ttir.loop_flops` of the same kernel.

    Raises ValueError if `text` holds no code.
    """
    if target not in RATES:
        raise ValueError(f"target is {target!r}; rates are known for {', '.join(RATES)}")
    found = [loop for code in functions(text) for loop in _hot(Flow(code))]
    if not found:
        raise ValueError(f"text holds no instructions; give what `cuobjdump -sass` prints\n{text[:2000]}")
    # As many loops as in the source, and in its order; else the compiler has merged, split or unrolled some away.
    flops = asked if len(asked) == len(found) else [None] * len(found)
    return [_read(code, warps, RATES[target], work) for code, work in zip(found, flops, strict=True)]


def _hot(flow: Flow) -> Iterator[Code]:
    loops = list(flow.innermost(MATRIX_OPS))
    if loops:
        yield from loops
        return
    yield max(flow.innermost(_LOADS), key=lambda code: _moved(code.always), default=flow.whole(_LOADS))


def _read(code: Code, warps: int, rates: Rates, asked: int | None) -> Loop:
    always = code.always
    matrix = [(i, Product.of(i)) for i in always if i.op in MATRIX_OPS]
    known = all(product for _, product in matrix)
    computed = sum(product.flops * warps // product.warps for _, product in matrix if product)
    flops = asked or computed
    halts = [place for place, i in enumerate(always) if i.op == "BAR" and not i.name.startswith("BAR.ARV")]
    least = cycles(always, warps=warps, rates=rates)
    if asked and "tensor" not in least:
        least["tensor"] = asked / rates.flops
    alone = cycles_alone(always, rates)
    binding = max(least, key=least.__getitem__) if "tensor" in least and flops else ""
    return Loop(
        warps=warps,
        instructions=len(always),
        sometimes=len(code.sometimes),
        flops=flops,
        done=round(computed / asked, 2) if asked and matrix and known else None,
        products=dict(Counter(f"{i.op} {product.shape}" if product else i.op for i, product in matrix)),
        waits=sum(i.name.startswith("WARPGROUP.DEPBAR") for i in always),
        barriers=len(halts),
        local=sum(i.op in ("LDL", "STL") for i in always),
        loaded=_moved(always, _LOADS),
        stored=_moved(always, _STORES),
        behind=_moved(always[halts[0] :], _LOADS) if halts else 0,
        in_flight=_in_flight(always),
        cycles={pipe: round(value) for pipe, value in least.items()},
        bound=round(flops / rates.flops / least[binding], 3) if binding else None,
        binding=binding,
        alone=round(flops * 4 / warps / rates.flops / alone, 3) if alone else None,
    )


def _moved(instructions: Iterable[Instruction], ops: frozenset[str] = _LOADS | _STORES) -> int:
    return sum(access_bytes(i) for i in instructions if i.op in ops)


def _in_flight(instructions: Sequence[Instruction]) -> int:
    """A load is under way until an instruction names one of its registers. Copies to shared memory are not counted."""
    under_way: dict[int, tuple[range, int]] = {}
    most = 0
    for place, i in enumerate([*instructions, *instructions]):  # twice: a loop may use what it loaded a step before
        named = {int(number) for number in re.findall(r"\bR(\d+)\b", i.operands)}
        under_way = {key: load for key, load in under_way.items() if named.isdisjoint(load[0])}
        if i.op == "LDG" and (match := re.match(r"R(\d+)", i.operands)):
            size = access_bytes(i)
            first = int(match[1])
            under_way[place] = range(first, first + max(size // 4, 1)), size
            most = max(most, sum(size for _, size in under_way.values()))
    return most


_PIPES = ("tensor", "shared", "mufu", "fp32", "alu", "lsu", "issue")
_COUNTS = ("instr", "/MFLOP", "waits", "barriers", "local")
_PRODUCTS = ("hot loop", "products", "binding", "bound", "alone", "done", *_COUNTS, *_PIPES)
_BYTES = ("loop over memory", "instr", "barriers", "B loaded", "behind", "in flight", "stored")


def table(loops: Iterable[tuple[str, Loop]]) -> str:
    """(name, loop) as lines of text: those with products, then the others."""
    loops = list(loops)
    parts = []
    if lines := [_products_line(name, loop) for name, loop in loops if loop.products]:
        title = "a block's cycles that a pipe needs at least in an iteration, and the bound from that: not measured"
        parts.append(f"{title}\n{aligned(_PRODUCTS, lines, left=3)}")
    if lines := [_bytes_line(name, loop) for name, loop in loops if not loop.products]:
        title = "bytes of global memory a thread and iteration: loaded, of those behind a barrier, most at once; stored"
        parts.append(f"{title}\n{aligned(_BYTES, lines, left=1)}")
    return "\n\n".join(parts)


def _products_line(name: str, loop: Loop) -> tuple[str, ...]:
    shapes = " ".join(f"{count}×{shape}" for shape, count in loop.products.items()).replace("×HGMMA ", "×")
    bound = "not modelled" if loop.bound is None else f"{loop.bound:.0%}"
    rate = "" if loop.per_megaflop is None else f"{loop.per_megaflop:.0f}"
    alone = "" if loop.alone is None else f"{loop.alone:.0%}"
    done = "?" if loop.done is None else f"×{loop.done:g}"
    pipes = (str(loop.cycles.get(pipe, "?")) for pipe in _PIPES)
    known = (name, shapes, loop.binding, bound, alone, done)
    return *known, _count(loop), rate, str(loop.waits), str(loop.barriers), str(loop.local), *pipes


def _bytes_line(name: str, loop: Loop) -> tuple[str, ...]:
    return name, _count(loop), *map(str, (loop.barriers, loop.loaded, loop.behind, loop.in_flight, loop.stored))


def _count(loop: Loop) -> str:
    return f"{loop.instructions}+{loop.sometimes}" if loop.sometimes else str(loop.instructions)


def aligned(head: Sequence[str], lines: Iterable[Sequence[str]], *, left: int) -> str:
    """Columns under each other: the first `left` of them flush left, the others flush right."""
    cells = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _loops(file: Path, warps: int, target: str) -> list[Loop]:
    content = file.read_bytes()
    text = cubin.disassemble(content) if content.startswith(b"\x7fELF") else content.decode()
    source = file.with_suffix(".ttir")
    return read_loops(text, warps=warps, target=target, asked=loop_flops(source.read_text()) if source.exists() else ())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hot_loop", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="a cubin, or its code as cuobjdump prints it"
    )
    parser.add_argument("--warps", type=int, required=True, help="of a block that run the loop")
    parser.add_argument("--target", choices=RATES, default="sm_90", help="whose rates count")
    options = parser.parse_args(arguments)
    read = []
    for file in options.files:
        loops = _loops(file, options.warps, options.target)
        read += [(f"{file.stem} {place}", loop) for place, loop in enumerate(loops, 1)]
    print(table(read))
    return 0


if __name__ == "__main__":
    _checkout.make_importable()
    sys.exit(main())
