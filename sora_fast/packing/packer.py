"""Fill packs of a fixed capacity with whole samples, so that all ranks of a step have the same work.

Two tools, both deterministic, neither ever splits or loses a sample:

- the *longest that still fits* (first-fit decreasing) fills packs almost to the last token, but puts the long
  videos together and the images together: packs of equal length whose attention costs differ by several times;
- the *cheapest pack that has room* (longest first) spreads long and short samples over a known number of packs:
  each pack becomes a small copy of the mix, and all cost the same.

`pack_offline` uses the first to learn how few packs suffice, `balance` the second to even them out, and
`StreamingPacker` both over a bounded look-ahead.
"""

import math
import operator
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

SampleId = int | str

# What of the samples, longest first, is placed by cost; the rest then goes wherever it fits best. All of them
# gives the most even packs; where that leaves samples over, a smaller share still evens out the long ones, which
# carry nearly all of the quadratic cost. None of them is first-fit decreasing.
_SHARES_BY_COST = (1.0, 0.5, 0.2, 0.0)


@dataclass(frozen=True)
class PackRules:
    """What a pack may hold, and what a sample of s tokens costs: a·s + b·s².

    capacity: tokens in a pack.
    max_segments: samples in a pack; None: any number.
    oversized: what to do with a sample longer than the capacity: "raise", or "skip" it and count it.
    a, b: only their ratio matters. The default is that of a DiT-XL block, which spends 24·C² FLOPs a token in its
        linear maps and 4·C a pair of tokens in full attention: b/a = 1/(6C) with C = 1152. For windowed attention
        take b = 0.
    """

    capacity: int
    max_segments: int | None = None
    oversized: Literal["raise", "skip"] = "raise"
    a: float = 1.0
    b: float = 1 / (6 * 1152)

    def __post_init__(self) -> None:
        _require_positive("capacity", self.capacity)
        if self.max_segments is not None:
            _require_positive("max_segments", self.max_segments)
        if self.oversized not in ("raise", "skip"):
            raise ValueError(f'oversized must be "raise" or "skip", got {self.oversized!r}')
        if not (self.a >= 0 and self.b >= 0 and 0 < self.a + self.b < math.inf):
            raise ValueError(f"a and b must be finite, not negative and not both 0, got a={self.a}, b={self.b}")

    @property
    def slots(self) -> int:
        """Most samples that a pack can hold: no sample is shorter than one token."""
        return self.capacity if self.max_segments is None else self.max_segments

    def cost(self, length: int) -> float:
        return self.a * length + self.b * length * length

    def fits(self, sample: SampleId, length: int) -> bool:
        """Whether the sample fits into an empty pack. Raises if it does not and `oversized` says so."""
        if length < 1:
            raise ValueError(f"sample {sample!r} has {length} tokens; a sample needs at least one")
        if length > self.capacity and self.oversized == "raise":
            raise ValueError(
                f"cannot pack sample {sample!r}: its {length} tokens exceed the capacity of {self.capacity}; "
                'raise the capacity, make the sample smaller, or pass oversized="skip"'
            )
        return length <= self.capacity


class Packing(NamedTuple):
    """packs: sample indices of each pack. skipped: indices of the samples longer than the capacity."""

    packs: list[list[int]]
    skipped: list[int]


def pack_offline(lengths: Sequence[int], rules: PackRules) -> Packing:
    """Pack all samples at once, by first-fit decreasing.

    lengths: tokens of each sample.
    Raises ValueError for a sample without tokens, and for one longer than the capacity unless
    `rules.oversized == "skip"`.

    With a `max_segments` that binds, first-fit decreasing ends in packs that have all their segments and few
    tokens; then the samples are spread instead, over the fewest packs that hold them.
    """
    lengths = _as_lengths(lengths)
    packed: list[int] = []
    skipped: list[int] = []
    for sample, length in enumerate(lengths):
        (packed if rules.fits(sample, length) else skipped).append(sample)
    packs = _first_fit_decreasing(packed, lengths, rules)
    if rules.max_segments is not None:
        packs = _spread_over_fewest(packed, lengths, rules, below=len(packs)) or packs
    return Packing(packs, skipped)


def balance(
    packs: Sequence[Sequence[int]], lengths: Sequence[int], rules: PackRules, *, ranks: int
) -> list[list[list[int]]]:
    """Regroup packed samples into steps whose `ranks` packs cost nearly the same.

    packs: sample indices, as `pack_offline` gives them; lengths: tokens of each sample.
    Returns `[step][rank] -> sample indices`. The number of packs stays, rounded up to a multiple of `ranks`;
    samples move between packs. Steps come by falling cost (shuffle them, whole, before training). A pack is empty
    only where there are too few samples to go round.
    """
    _require_positive("ranks", ranks)
    lengths = _as_lengths(lengths)
    samples = _longest_first((sample for pack in packs for sample in pack), lengths)
    for sample in samples:
        if not rules.fits(sample, lengths[sample]):
            raise ValueError(f"packs hold sample {sample}: {lengths[sample]} tokens, capacity {rules.capacity}")
    count = -(-len(packs) // ranks) * ranks
    even = _spread_all(samples, count, lengths, rules)
    if even is None:
        even = [list(pack) for pack in packs] + [[] for _ in range(count - len(packs))]
    even.sort(key=_cost_of_pack(lengths, rules), reverse=True)
    return [even[step : step + ranks] for step in range(0, count, ranks)]


class StreamingPacker:
    """Packs samples as they arrive; looks at no more than `look_ahead` of them at once.

    Samples wait until `look_ahead` of them (or, if those are too short, enough to fill one step) are there. Then as
    many full packs as they make are formed together, all of nearly the same cost, and handed out one step at a
    time, while the next samples come in. A sample left over goes first the next time, so none waits for ever.

    rules: capacity, segment limit and cost. look_ahead: more of it means fuller and more even packs (500: about 1% of
    waste at a capacity of 32,768). ranks: packs come in steps of that many; ranks that feed their packers the same
    samples agree without communication.

    A run that saves `state_dict()` (JSON) together with the number of samples it has pushed resumes exactly.
    """

    def __init__(self, rules: PackRules, *, look_ahead: int = 500, ranks: int = 1) -> None:
        _require_positive("look_ahead", look_ahead)
        _require_positive("ranks", ranks)
        self.rules = rules
        self.look_ahead = look_ahead
        self.ranks = ranks
        self.skipped = 0
        self._waiting: list[tuple[SampleId, int]] = []
        self._tokens = 0  # of all that wait
        self._left_over = 0  # how many of the first in line were passed over before
        self._ready: deque[list[SampleId]] = deque()

    def push(self, sample_id: SampleId, length: int) -> list[list[SampleId]]:
        """Take one sample; returns the `ranks` packs (lists of sample ids) of a complete step, or an empty list.

        Raises ValueError for a sample without tokens, and for one longer than the capacity unless
        `rules.oversized == "skip"`: then it is counted in `skipped`.
        """
        sample_id = sample_id if isinstance(sample_id, str) else operator.index(sample_id)
        length = _as_length(sample_id, length)
        if self.rules.fits(sample_id, length):
            self._waiting.append((sample_id, length))
            self._tokens += length
        else:
            self.skipped += 1
        if not self._ready and len(self._waiting) >= self.look_ahead and (count := self._full_packs()):
            self._pack_waiting(count)
        return [self._ready.popleft() for _ in range(self.ranks)] if self._ready else []

    def flush(self) -> list[list[SampleId]]:
        """The packs of all samples still held, in whole steps: the last ones may be part full or empty."""
        lengths = [length for _, length in self._waiting]
        steps = balance(pack_offline(lengths, self.rules).packs, lengths, self.rules, ranks=self.ranks)
        packs = [*self._ready, *(self._ids(pack) for step in steps for pack in step)]
        self._hold([], left_over=0)
        self._ready.clear()
        return packs

    def state_dict(self) -> dict[str, Any]:
        """Everything held, as plain ints, strings and lists."""
        return {
            **self._shape(),
            "skipped": self.skipped,
            "left_over": self._left_over,
            "waiting": [[sample_id, length] for sample_id, length in self._waiting],
            "ready": [list(pack) for pack in self._ready],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises ValueError if capacity, max_segments or ranks were others."""
        for name, value in self._shape().items():
            if state[name] != value:
                raise ValueError(f"cannot resume: saved with {name}={state[name]}, this packer has {name}={value}")
        self.skipped = state["skipped"]
        self._hold([(sample_id, length) for sample_id, length in state["waiting"]], left_over=state["left_over"])
        self._ready = deque(list(pack) for pack in state["ready"])

    def _full_packs(self) -> int:
        """How many packs what waits can fill, in whole steps. Asked at every sample: it looks at none of them."""
        count = max(self._tokens // self.rules.capacity, len(self._waiting) // self.rules.slots)
        return count - count % self.ranks

    def _pack_waiting(self, count: int) -> None:
        lengths = [length for _, length in self._waiting]
        # The oldest samples that fill the packs take part; the younger ones only close the gaps.
        oldest = bisect_right(list(accumulate(lengths)), count * self.rules.capacity)
        again = min(self._left_over, oldest)
        in_turn = [*range(again), *_longest_first(range(again, oldest), lengths)]
        packs = _spread(in_turn, count, lengths, self.rules)
        _fill_gaps(packs, range(len(lengths)), lengths, self.rules)
        packs.sort(key=_cost_of_pack(lengths, self.rules), reverse=True)
        self._ready.extend(self._ids(pack) for pack in packs)
        placed = {place for pack in packs for place in pack}
        rest = [place for place in range(len(lengths)) if place not in placed]
        self._hold([self._waiting[place] for place in rest], left_over=sum(place < oldest for place in rest))

    def _hold(self, waiting: list[tuple[SampleId, int]], *, left_over: int) -> None:
        self._waiting, self._left_over = waiting, left_over
        self._tokens = sum(length for _, length in waiting)

    def _ids(self, pack: Iterable[int]) -> list[SampleId]:
        return [self._waiting[place][0] for place in pack]

    def _shape(self) -> dict[str, int | None]:
        return {"capacity": self.rules.capacity, "max_segments": self.rules.max_segments, "ranks": self.ranks}


class _Shelf:
    """Samples sorted by length, to take the longest that still fits."""

    def __init__(self, samples: Iterable[int], lengths: Sequence[int]) -> None:
        self._samples: dict[int, deque[int]] = {}
        for sample in samples:
            self._samples.setdefault(lengths[sample], deque()).append(sample)
        self._lengths = sorted(self._samples)

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def fill(self, pack: list[int], room: int, slots: int) -> None:
        while len(pack) < slots and (at := bisect_right(self._lengths, room)):
            length = self._lengths[at - 1]
            pack.append(self._samples[length].popleft())
            room -= length
            if not self._samples[length]:
                del self._samples[length], self._lengths[at - 1]


def _first_fit_decreasing(samples: Iterable[int], lengths: Sequence[int], rules: PackRules) -> list[list[int]]:
    shelf = _Shelf(samples, lengths)
    packs: list[list[int]] = []
    while shelf:
        packs.append([])
        shelf.fill(packs[-1], rules.capacity, rules.slots)
    return packs


def _fill_gaps(packs: Sequence[list[int]], samples: Iterable[int], lengths: Sequence[int], rules: PackRules) -> bool:
    """Put those of the samples that no pack holds wherever they still fit; True if all found a place."""
    placed = {sample for pack in packs for sample in pack}
    shelf = _Shelf((sample for sample in samples if sample not in placed), lengths)
    for pack in packs:
        shelf.fill(pack, rules.capacity - sum(lengths[sample] for sample in pack), rules.slots)
    return not shelf


def _spread(samples: Iterable[int], count: int, lengths: Sequence[int], rules: PackRules) -> list[list[int]]:
    """Give each sample in turn to the cheapest of `count` packs that has room; leave out those that no pack takes."""
    packs: list[list[int]] = [[] for _ in range(count)]
    room = [rules.capacity] * count
    cheapest = [(0.0, pack) for pack in range(count)]
    crowded: list[tuple[int, int, float]] = []  # roomiest first: too full for some sample, perhaps not for the next
    for sample in samples:
        length = lengths[sample]
        while crowded and -crowded[0][0] >= length:
            _, pack, cost = heappop(crowded)
            heappush(cheapest, (cost, pack))
        while cheapest and room[cheapest[0][1]] < length:
            cost, pack = heappop(cheapest)
            heappush(crowded, (-room[pack], pack, cost))
        if not cheapest:
            continue
        cost, pack = cheapest[0]
        packs[pack].append(sample)
        room[pack] -= length
        if len(packs[pack]) == rules.slots:
            heappop(cheapest)
        else:
            heapreplace(cheapest, (cost + rules.cost(length), pack))
    return packs


def _spread_all(samples: Sequence[int], count: int, lengths: Sequence[int], rules: PackRules) -> list[list[int]] | None:
    """All samples (longest first) in `count` packs of nearly the same cost; None if that cannot be done."""
    for share in _SHARES_BY_COST:
        packs = _spread(samples[: math.ceil(share * len(samples))], count, lengths, rules)
        if _fill_gaps(packs, samples, lengths, rules):
            return packs
    return None


def _spread_over_fewest(
    samples: Iterable[int], lengths: Sequence[int], rules: PackRules, *, below: int
) -> list[list[int]] | None:
    """The samples spread over as few packs as hold them, by bisection; None if that takes `below` packs or more."""
    samples = _longest_first(samples, lengths)
    tokens = sum(lengths[sample] for sample in samples)
    too_few = max(-(-tokens // rules.capacity), -(-len(samples) // rules.slots)) - 1
    fewest = None
    while below - too_few > 1:
        count = (below + too_few) // 2
        packs = _spread_all(samples, count, lengths, rules)
        if packs is None:
            too_few = count
        else:
            fewest, below = packs, count
    return fewest


def _longest_first(samples: Iterable[int], lengths: Sequence[int]) -> list[int]:
    return sorted(samples, key=lambda sample: -lengths[sample])


def _cost_of_pack(lengths: Sequence[int], rules: PackRules) -> Callable[[Sequence[int]], float]:
    return lambda pack: sum(rules.cost(lengths[sample]) for sample in pack)


def _as_lengths(lengths: Iterable[int]) -> list[int]:
    return [_as_length(sample, length) for sample, length in enumerate(lengths)]


def _as_length(sample: SampleId, length: int) -> int:
    try:
        return operator.index(length)
    except TypeError:
        raise TypeError(f"the length of sample {sample!r} must be an int, got {length!r}") from None


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
