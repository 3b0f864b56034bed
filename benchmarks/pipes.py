"""How many cycles a multiprocessor's pipes need at least for some instructions."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.sass import Instruction


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor does in one cycle at best.

    flops: of dense bf16 or fp16 products with fp32 sums. H100: 989.4 TFLOP/s on 132 multiprocessors at 1.83 GHz; A100:
        312 on 108 at 1.41; B200: 2,250 on 148 at 1.85 (NVIDIA's data sheets).
    hmma: the share of that which a warp's own instructions (mma.sync) reach; None: not known.
    shared_bytes: shared memory has 32 banks of 4 bytes.
    mufu, fp32, alu, lsu: threads; the table of arithmetic throughput in the CUDA C++ programming guide (exp2 among the
        functions of 16; fp32 add, multiply; 32-bit integer add, compare, logic; warp shuffle).
    issue: instructions of a warp; one a scheduler, of which there are four.
    """

    flops: int
    hmma: float | None
    shared_bytes: int
    mufu: int
    fp32: int
    alu: int
    lsu: int
    issue: int


RATES = {
    "sm_80": Rates(2048, 1.0, 128, 16, 64, 64, 32, 4),
    # mma.sync on Hopper: 62.9% of the peak on average (Luo et al. 2024, arXiv 2402.13499); not measured by us.
    "sm_90": Rates(4096, 0.629, 128, 16, 128, 64, 32, 4),
    # The guide's figures for 10.0 are taken to be those for 9.0.
    "sm_100": Rates(8192, None, 128, 16, 128, 64, 32, 4),
}
# Instructions whose pipe is known. What is not listed costs its issue slot alone: moves, predicates, the uniform path.
_FP32 = frozenset({"FADD", "FFMA", "FMUL", "IMAD", "HADD2", "HFMA2", "HMUL2"})
_ALU = frozenset(
    "F2FP FMNMX FSEL FSET FSETP IADD3 IMNMX ISETP LEA LOP3 PLOP3 PRMT SEL SGXT SHF VIMNMX".split()  # noqa: SIM905
)
_LSU = frozenset("ATOMG ATOMS LDG LDGSTS LDL LDS LDSM RED REDG SHFL STG STL STS STSM".split())  # noqa: SIM905
_MATRIX = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(\d+)")
MATRIX_OPS = frozenset({"HGMMA", "HMMA", "UTCHMMA"})
_THREADS = 32  # a warp
_GROUP = 4  # warps that issue one HGMMA together


@dataclass(frozen=True)
class Product:
    """One matrix instruction: M×N×K for the warps that issue it together."""

    op: str
    m: int
    n: int
    k: int
    shared_bytes: int  # operands read from shared memory, at every use anew

    @staticmethod
    def of(instruction: Instruction) -> "Product | None":
        """None if it is no matrix instruction, or one whose shape stands in a descriptor (Blackwell's UTCHMMA)."""
        match = _MATRIX.match(instruction.name)
        if match is None:
            return None
        m, n, k = (int(size) for size in match.groups() if size)
        if instruction.op == "HMMA":
            return Product("HMMA", m, n, k, 0)
        from_shared = instruction.operands.split(", ")[1].startswith("gdesc")  # A; B always is
        return Product("HGMMA", m, n, k, (m * from_shared + n) * 32)

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def warps(self) -> int:
        return _GROUP if self.op == "HGMMA" else 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def cycles(self, rates: Rates) -> float:
        """At least. Raises ValueError where the rate is not known.

        An HGMMA also waits for its operands: with A in shared memory, N=8 has 18 cycles for the work of 4, N=32 24 for
        16, N=64 just what it needs. With A in registers no such floor is known, so none is assumed.
        """
        # K is 32 bytes for every type of HGMMA: fp8 does twice the work of bf16 in the same cycles, TF32 half.
        work = 2 * self.m * self.n * (16 if self.op == "HGMMA" else self.k)
        if self.op == "HGMMA":
            return max(work / rates.flops, self.shared_bytes / rates.shared_bytes)
        if rates.hmma is None:
            raise ValueError("the rate of HMMA is not known here")
        return work / (rates.flops * rates.hmma)


def cycles(instructions: Iterable[Instruction], *, warps: int, rates: Rates) -> dict[str, float]:
    """Pipe → cycles of one multiprocessor if `warps` warps run the instructions, were nothing else in the way.

    A predicated instruction costs its issue slot only: it may be off. shared: what matrix instructions, loads and
    stores move, without conflicts; the copies that fill it (cp.async, TMA) are left out, as how they share its banks
    is not published. tensor is missing where a rate or a shape is not known.
    """
    instructions = tuple(instructions)
    sure = [i for i in instructions if not i.predicate]
    ops = Counter(i.op for i in sure)
    products = [product for product in map(Product.of, sure) if product]

    def threads(kinds: frozenset[str], rate: int) -> float:
        return sum(ops[op] for op in kinds) * _THREADS * warps / rate

    moved = sum(_shared_bytes(i) for i in sure) * warps + sum(p.shared_bytes * warps / p.warps for p in products)
    found = {
        "shared": moved / rates.shared_bytes,
        "mufu": threads(frozenset({"MUFU"}), rates.mufu),
        "fp32": threads(_FP32, rates.fp32),
        "alu": threads(_ALU, rates.alu),
        "lsu": threads(_LSU, rates.lsu),
        "issue": len(instructions) * warps / rates.issue,
    }
    is_known = not ops["UTCHMMA"] and (rates.hmma is not None or not ops["HMMA"])
    return {"tensor": sum(p.cycles(rates) * warps / p.warps for p in products), **found} if is_known else found


def _shared_bytes(instruction: Instruction) -> int:
    """Bytes that a warp's instruction loads from shared memory or stores there."""
    if instruction.op in ("LDSM", "STSM"):  # 8×8 matrices of 16 bits
        return 128 * int(instruction.name.rsplit(".", 1)[1]) if instruction.name[-1] in "24" else 128
    return _THREADS * access_bytes(instruction) if instruction.op in ("LDS", "STS") else 0


def access_bytes(instruction: Instruction) -> int:
    """Bytes a thread of a load or a store."""
    parts = instruction.name.split(".")
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((width for part, width in widths.items() if part in parts), 4)
