"""What the network is given in the steps of a phase: made once, so that a step is the network and guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from sora_fast.diffusion.clean import clean_frames
from sora_fast.diffusion.guidance import strengthened
from sora_fast.diffusion.losses import split_output
from sora_fast.diffusion.paths import NoisePath
from sora_fast.diffusion.samplers import Prediction
from sora_fast.generation.room import Room
from sora_fast.generation.tasks import PackedRequests
from sora_fast.models.sora_dit import Prepared, SoraDiT
from sora_fast.models.text import PackedText
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from sora_fast.packing._bundle import TensorBundle

Network = Callable[[RaggedLatents, Prepared], RaggedLatents]
# Modulation tables are made for as many steps at once as take so many numbers (256 MB in fp32).
_MOST_NUMBERS = 1 << 26


@dataclass(frozen=True, eq=False)
class Seen(TensorBundle):
    """All that a step reads of a pack: of P elements of the state, and J that the network sees.

    joined: the videos that the network sees; its values do not matter. prepared: without modulations, which are of a
    step. counts: how many tables each of its layers has.
    source: [J] int32, where in the state each element that is seen comes from. The state's own stand first.
    without: [P] int32, for each element of the state that which is seen without a prompt; its own, if there is none.
    strength: guidance − 1, [P], or [1] of all; None, and so `without`: no guidance.
    """

    joined: RaggedLatents
    prepared: Prepared
    source: Tensor
    without: Tensor | None
    strength: Tensor | None
    counts: tuple[int, ...]

    def predict(self, x: Tensor, tables: Tensor, path: NoisePath, network: Network) -> Prediction:
        """What the network says about the state x [P], guided. tables: as `Modulations` gives them for a step.
        network: as `SoraDiT.denoise`."""
        parts = iter(tables.unbind(0))
        modulations = tuple(tuple(islice(parts, count)) for count in self.counts)
        latents = self.joined.with_flat(x.index_select(0, self.source))
        output = network(latents, replace(self.prepared, modulations=modulations))
        output = output.with_flat(output.flat.to(x.dtype))
        target, variance = split_output(output, self.joined, path)
        said = target[: x.shape[0]]
        if self.strength is not None:
            # Not of a learned variance, which it would extrapolate out of its bounds.
            said = strengthened(said, target.index_select(0, self.without), self.strength)
        return Prediction(said, None if variance is None else variance[: x.shape[0]])


@dataclass(frozen=True, eq=False)
class Pack:
    """The network's input for some requests: the guided ones, the others, then the guided ones without a prompt.

    state: the videos that are made; its values are what is given. seen: by the network. text: that conditions them.
    conditioning: sigma [M] is 1 for rows that have the noise level of their segment, 0 for those of what is given.
    tokens: that the network sees. room: that is taken for them; None: what they need.
    """

    model: SoraDiT
    state: RaggedLatents
    seen: Seen
    conditioning: Conditioning
    text: PackedText | None
    tokens: int
    room: Room | None

    @staticmethod
    def of(
        model: SoraDiT,
        packed: PackedRequests,
        text: PackedText | None,
        guidance: Sequence[float],
        room: Room | None = None,
    ) -> "Pack":
        """packed: the requests, the guided ones first; text: theirs, then that without a prompt of the guided ones.
        guidance: of the guided ones. room: sizes for all that is seen; None: those that are needed."""
        guided, state = len(guidance), packed.data
        videos, grids = state.to_list(), packed.layout.grids.tolist()
        grids += grids[:guided]
        # One segment would be a size of its own to torch.compile.
        places = max(2, len(grids)) if room is None else room.segments
        elements = None if room is None else room.elements(model)
        joined = RaggedLatents.from_list([*videos, *videos[:guided]], capacity=elements, max_segments=places)
        if room is not None:
            state = RaggedLatents.from_list(videos, capacity=elements, max_segments=places)
        layout = PackedLayout.from_grids(
            grids,
            order="raster" if packed.layout.is_raster else "tiled",
            capacity=None if room is None else room.tokens,
            max_segments=places,
        ).to(packed.layout.device)
        clean = _given(packed, layout, guided) if packed.given or room is not None else None
        conditioning = _conditioning(layout, clean)
        prepared = model.prepare(layout, conditioning, text)
        if model.config.text_dim is not None:
            prepared = replace(prepared, texts=model.read(text))
        sizes = [video.numel() for video in videos]
        source, without = _copies(sizes, guided, state.flat.shape[0], joined.flat.shape[0])
        strength = _strength(sizes, guidance, state.flat.shape[0], always=room is not None)
        parts = (source, None if strength is None else without, strength)
        seen = Seen(
            joined,
            replace(prepared, modulations=()),
            *(None if part is None else part.to(layout.device) for part in parts),
            counts=tuple(map(len, prepared.modulations)),
        )
        return Pack(model, state, seen, conditioning, text, sum(t * h * w for t, h, w in grids), room)

    def modulations(self, sigmas: Tensor, guided: int, ends: Tensor | None = None) -> "Modulations":
        """For noise levels [K, S] of the requests, of which so many are guided, and of a flow map those that its steps
        lead to."""
        return Modulations(self, self._of_rows(sigmas, guided), None if ends is None else self._of_rows(ends, guided))

    def _of_rows(self, sigmas: Tensor, guided: int) -> Tensor:
        """[K, S] → [K, M]."""
        sigmas = torch.cat([sigmas, sigmas[:, :guided]], dim=1)
        sigmas = pad(sigmas, (0, self.seen.joined.max_segments - sigmas.shape[1]))
        return sigmas[:, self.conditioning.segment.long()].float() * self.conditioning.sigma


class Modulations:
    """The modulation tables of every step of a pack, all layers of many steps in one product each."""

    def __init__(self, pack: Pack, sigmas: Tensor, ends: Tensor | None = None) -> None:
        """sigmas, ends: [K, M]."""
        self._pack, self._sigmas, self._ends = pack, sigmas, ends
        config = pack.model.config
        numbers = sigmas.shape[1] * config.dim * (config.depth * (9 if config.text_dim is not None else 6) + 2)
        self._many = max(1, _MOST_NUMBERS // numbers)
        self._first, self._tables = 0, self._made(0)

    def __getitem__(self, step: int) -> Tensor:
        """[T, M, C]: the T tables of a step, those of a layer side by side."""
        if not self._first <= step < self._first + self._many:
            self._first = step - step % self._many
            self._tables = self._made(self._first)
        return self._tables[step - self._first]

    def _made(self, first: int) -> Tensor:
        """[K, T, M, C]"""
        some, conditioning = slice(first, first + self._many), self._pack.conditioning
        sigmas, ends = self._sigmas[some], None if self._ends is None else self._ends[some].flatten()
        steps, rows = sigmas.shape
        layers = self._pack.model.modulations(
            sigmas.flatten(), conditioning.segment.repeat(steps), self._pack.text, None, sigma_end=ends
        )
        return torch.stack([table.view(steps, rows, -1) for layer in layers for table in layer], dim=1)


def _given(packed: PackedRequests, layout: PackedLayout, guided: int) -> Tensor:
    """[N] bool: the tokens that are given, of the requests and of the copies of the guided ones."""
    ends = (torch.cat([counts, counts[:guided]]) for counts in (packed.heads, packed.tails))
    return clean_frames(layout, *(pad(counts, (0, layout.max_segments - counts.shape[0])) for counts in ends))


def _conditioning(layout: PackedLayout, clean: Tensor | None) -> Conditioning:
    ones = torch.ones(layout.max_segments, dtype=torch.float32, device=layout.device)
    if clean is None:
        # Not in the layout's own tensors: a compiled graph would take it that there are as many rows as segments.
        return Conditioning.per_segment(ones, layout)._map(torch.clone)
    return Conditioning.with_clean(ones, clean, layout)


def _copies(sizes: Sequence[int], guided: int, state: int, joined: int) -> tuple[Tensor, Tensor]:
    """`Seen.source` and `Seen.without`, for videos of so many elements, of which the first are seen twice."""
    used, twice = sum(sizes), sum(sizes[:guided])
    source, without = (torch.zeros(size, dtype=torch.int32, device="cpu") for size in (joined, state))
    source[:used] = without[:used] = torch.arange(used, dtype=torch.int32, device="cpu")
    source[used : used + twice] = source[:twice]
    without[:twice] += used
    return source, without


def _strength(sizes: Sequence[int], guidance: Sequence[float], state: int, *, always: bool) -> Tensor | None:
    """`Seen.strength`; always: [P], whatever there is."""
    if not guidance and not always:
        return None
    if len(set(guidance)) == 1 and len(guidance) == len(sizes) and not always:
        return torch.tensor([guidance[0] - 1], dtype=torch.float32, device="cpu")
    strength = torch.zeros(state, dtype=torch.float32, device="cpu")
    for part, scale in zip(strength[: sum(sizes)].split(list(sizes)), guidance, strict=False):
        part.fill_(scale - 1)
    return strength
