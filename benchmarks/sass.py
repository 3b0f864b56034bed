"""The machine code of a kernel as cuobjdump prints it: its instructions, and the loops that they form."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx

# "        /*0010*/   @P0 LDG.E.128 R4, desc[UR4][R2.64] ;": a line a machine instruction, predicated or not.
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);",
    re.MULTILINE,
)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Instruction:
    """@P0 LDG.E.128 R4, desc[UR4][R2.64]: predicate "@P0", name "LDG.E.128", op "LDG"."""

    address: int
    predicate: str
    name: str
    operands: str = ""

    @cached_property
    def op(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def target(self) -> int | None:
        """Where it may jump to. A call counts as a jump that may also fall through: what is called is not followed."""
        if self.op not in ("BRA", "JMP", "CALL"):
            return None
        addresses = re.findall(r"0x[0-9a-f]+", self.operands)
        return int(addresses[-1], 16) if addresses else None

    @property
    def falls_through(self) -> bool:
        """What follows it may be the next to run. "BRA P2, 0x100" depends on P2 as "@P2 BRA 0x100" does."""
        if self.op in ("BRA", "JMP"):
            return bool(self.predicate) or "," in self.operands
        return self.op not in ("EXIT", "RET", "BRX", "JMX") or bool(self.predicate)


@dataclass(frozen=True)
class Code:
    """Instructions of one function that run together: the body of a loop, or all of it."""

    always: tuple[Instruction, ...]  # in every iteration
    sometimes: tuple[Instruction, ...]  # on paths that an iteration may leave out


def functions(text: str) -> Iterator[tuple[Instruction, ...]]:
    """The instructions of each function in what `cuobjdump -sass` prints, with the NOPs that fill its end up."""
    starts = [match.start() for match in _FUNCTION.finditer(text)] or [0]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        found = [
            Instruction(int(m["address"], 16), m["predicate"] or "", m["name"], m["operands"].strip())
            for m in _INSTRUCTION.finditer(text, start, end)
        ]
        if found:
            yield tuple(found)


class Flow:
    """The control flow of a function: which blocks of instructions lead where, and the natural loops among them.

    A loop is what its header's back edges close, wherever it stands: the compiler puts rare paths behind the end of a
    function and jumps back from there, so a branch backwards alone is no loop.
    """

    def __init__(self, instructions: Sequence[Instruction]):
        if not instructions:
            raise ValueError("instructions is empty; give those of one function")
        self._blocks = _blocks(instructions)
        self._entry = instructions[0].address
        graph = networkx.DiGraph()
        graph.add_nodes_from(self._blocks)
        graph.add_edges_from(_edges(self._blocks))
        self._graph = graph.subgraph(networkx.descendants(graph, self._entry) | {self._entry})
        self._above = dict(networkx.immediate_dominators(self._graph, self._entry))

    def whole(self, ops: frozenset[str]) -> Code:
        """The function from its start to its end: of several, the one with most code on every way to it.

        What runs always: as for `innermost`.
        """
        ends = [block for block in self._graph if not self._graph.out_degree(block)]
        ends.sort(key=lambda end: sum(len(self._blocks[block]) for block in self._dominators(end)))
        return self._code(set(self._graph), ends[-1:], self._holding(ops))

    def innermost(self, ops: frozenset[str]) -> Iterator[Code]:
        """Loops with an instruction of `ops` and without such a loop within, in the order of their addresses.

        What runs always is what every way through the loop passes. Where that holds none of `ops` (a test of the tile
        stands around them), it is joined by them and by what the loop passes on the way to them.
        """
        wanted = self._holding(ops)
        loops = {header: body for header, body in self._loops().items() if body & wanted}
        for header, body in sorted(loops.items()):
            if not any(other != header and other in body for other in loops):
                latches = [block for block in self._graph.predecessors(header) if block in body]
                yield self._code(body, latches, body & wanted)

    def behind(self, op: str) -> Iterator[tuple[Instruction, tuple[Instruction, ...]]]:
        """Each instruction `op`, with all that no way reaches but through it."""
        for block, instructions in self._blocks.items():
            for place, instruction in enumerate(instructions):
                if instruction.op == op and block in self._graph:
                    later = [self._blocks[b] for b in self._graph if b != block and block in self._dominators(b)]
                    yield instruction, (*instructions[place + 1 :], *(i for piece in later for i in piece))

    def _holding(self, ops: frozenset[str]) -> set[int]:
        return {block for block in self._graph if any(i.op in ops for i in self._blocks[block])}

    def _loops(self) -> dict[int, set[int]]:
        """Header → blocks of its natural loop."""
        loops: dict[int, set[int]] = {}
        for latch, header in self._graph.edges:
            if header not in self._dominators(latch):
                continue
            body = loops.setdefault(header, {header})
            ahead = [latch]
            while ahead:
                block = ahead.pop()
                if block not in body:
                    body.add(block)
                    ahead += self._graph.predecessors(block)
        return loops

    def _dominators(self, block: int) -> set[int]:
        """Blocks that every way to `block` passes, itself included."""
        found = {block}
        while block != self._entry:
            block = self._above[block]
            found.add(block)
        return found

    def _code(self, body: set[int], ends: Sequence[int], wanted: set[int]) -> Code:
        always = set.intersection(*map(self._dominators, ends)) if ends else {self._entry}
        if not always & wanted:
            always = always.union(*map(self._dominators, wanted))
        every = [(block in always, self._blocks[block]) for block in sorted(body)]
        return Code(
            tuple(instruction for runs, block in every if runs for instruction in block),
            tuple(instruction for runs, block in every if not runs for instruction in block),
        )


def _blocks(instructions: Sequence[Instruction]) -> dict[int, list[Instruction]]:
    """Straight pieces: address of the first instruction → instructions."""
    starts = {instructions[0].address} | {i.target for i in instructions if i.target is not None}
    blocks: dict[int, list[Instruction]] = {}
    begins = True
    for instruction in instructions:
        if begins or instruction.address in starts:
            current = blocks.setdefault(instruction.address, [])
        current.append(instruction)
        begins = instruction.target is not None or not instruction.falls_through or instruction.op == "EXIT"
    return blocks


def _edges(blocks: dict[int, list[Instruction]]) -> Iterator[tuple[int, int]]:
    addresses = list(blocks)
    following = dict(pairwise(addresses))
    for start, block in blocks.items():
        last = block[-1]
        if last.target in blocks:
            yield start, last.target
        if last.falls_through and start in following:
            yield start, following[start]
