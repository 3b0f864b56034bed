"""What the network is given in the steps of a phase: made once, so that a step is the network and guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from sora_fast.diffusion.clean import clean_frames
from sora_fast.diffusion.guidance import strengthened
from sora_fast.diffusion.losses import split_output
from sora_fast.diffusion.paths import NoisePath
from sora_fast.diffusion.samplers import Prediction
from sora_fast.generation.tasks import PackedRequests
from sora_fast.models.sora_dit import Prepared, SoraDiT
from sora_fast.models.text import PackedText
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents

Network = Callable[[RaggedLatents, Prepared], RaggedLatents]
# Modulation tables are made for as many steps at once as take so many numbers (256 MB in fp32).
_MOST_NUMBERS = 1 << 26


@dataclass(frozen=True, eq=False)
class Pack:
    """The network's input for some requests: the guided ones, the others, then the guided ones without a prompt.

    So the input without prompts is a prefix of the state, put behind it, and what is said of it is cut off again.

    state: the videos that are made; its values do not matter. joined: the network's, those without a prompt too.
    prepared: without modulations, which are of a step. text: that conditions them.
    conditioning: sigma [M] is 1 for rows that have the noise level of their segment, 0 for those of what is given.
    guided: elements of the state that are guided. tokens: that the network sees.
    strength: guidance − 1 of every element of what is said about the guided ones, or [1] of all; None: no guidance.
    """

    model: SoraDiT
    state: RaggedLatents
    joined: RaggedLatents
    prepared: Prepared
    conditioning: Conditioning
    text: PackedText | None
    guided: int
    strength: Tensor | None
    tokens: int

    @staticmethod
    def of(model: SoraDiT, packed: PackedRequests, text: PackedText | None, guidance: Sequence[float]) -> "Pack":
        """packed: the requests, the guided ones first; text: theirs, then that without a prompt of the guided ones.
        guidance: of the guided ones."""
        guided, state = len(guidance), packed.data
        grids = packed.layout.grids.tolist()
        videos = state.to_list()
        # One segment would be a size of its own to torch.compile.
        places = max(2, len(videos) + guided)
        order = "raster" if packed.layout.is_raster else "tiled"
        layout = PackedLayout.from_grids([*grids, *grids[:guided]], order=order, max_segments=places)
        layout = layout.to(packed.layout.device)
        joined = RaggedLatents.from_list([*videos, *videos[:guided]], max_segments=places)
        ends = [_padded(torch.cat([counts, counts[:guided]]), places) for counts in (packed.heads, packed.tails)]
        conditioning = _conditioning(layout, clean_frames(layout, *ends) if packed.given else None)
        prepared = model.prepare(layout, conditioning, text)
        if model.config.text_dim is not None:
            prepared = replace(prepared, texts=model.read(text))
        strength = _strength(videos[:guided], guidance, model).to(layout.device) if guided else None
        count = sum(video.numel() for video in videos[:guided])
        return Pack(model, state, joined, prepared, conditioning, text, count, strength, layout.capacity)

    def modulations(self, sigmas: Tensor, guided: int, ends: Tensor | None = None) -> "Modulations":
        """For noise levels [K, S] of the requests, of which so many are guided, and of a flow map those that its steps
        lead to."""
        return Modulations(self, self._of_rows(sigmas, guided), None if ends is None else self._of_rows(ends, guided))

    def _of_rows(self, sigmas: Tensor, guided: int) -> Tensor:
        """[K, S] → [K, M]."""
        sigmas = torch.cat([sigmas, sigmas[:, :guided]], dim=1)
        sigmas = torch.nn.functional.pad(sigmas, (0, self.joined.max_segments - sigmas.shape[1]))
        return sigmas[:, self.conditioning.segment.long()].float() * self.conditioning.sigma

    def predict(self, x: Tensor, prepared: Prepared, path: NoisePath, network: Network) -> Prediction:
        """What the network says about the state [P], guided. network: as `SoraDiT.denoise`."""
        flat = torch.cat([x, x[: self.guided]]) if self.guided else x
        output = network(self.joined.with_flat(flat), prepared).flat.to(x.dtype)
        said = output[: output.shape[0] * x.shape[0] // flat.shape[0]]
        if self.strength is not None:
            without = output[said.shape[0] :]
            first, others = said.split([without.shape[0], said.shape[0] - without.shape[0]])
            said = torch.cat([strengthened(first, without, self.strength), others])
        if not path.learned_variance:
            return Prediction(said)
        multiple = torch.tensor([said.shape[0] // x.shape[0], 1, 1, 1], dtype=torch.int32, device=x.device)
        output = RaggedLatents(said, multiple[0] * self.state.offsets, multiple * self.state.shapes)
        return Prediction(*split_output(output, self.state, path))


class Modulations:
    """The modulation tables of every step of a pack, all layers of many steps in one product each."""

    def __init__(self, pack: Pack, sigmas: Tensor, ends: Tensor | None = None) -> None:
        """sigmas, ends: [K, M]."""
        self._pack, self._sigmas, self._ends = pack, sigmas, ends
        config = pack.model.config
        numbers = sigmas.shape[1] * config.dim * (config.depth * (9 if config.text_dim is not None else 6) + 2)
        self._many = max(1, _MOST_NUMBERS // numbers)
        self._first, self._tables = 0, self._made(0)

    def __getitem__(self, step: int) -> Prepared:
        """All that the network needs at a step."""
        if not self._first <= step < self._first + self._many:
            self._first = step - step % self._many
            self._tables = self._made(self._first)
        tables = iter(self._tables[step - self._first].unbind(0))
        modulations = tuple(tuple(islice(tables, count)) for count in self._counts)
        return replace(self._pack.prepared, modulations=modulations)

    def _made(self, first: int) -> Tensor:
        """[K, T, M, C]: T tables of a step, those of a block side by side."""
        some, conditioning = slice(first, first + self._many), self._pack.conditioning
        sigmas, ends = self._sigmas[some], None if self._ends is None else self._ends[some].flatten()
        steps, rows = sigmas.shape
        layers = self._pack.model.modulations(
            sigmas.flatten(), conditioning.segment.repeat(steps), self._pack.text, None, sigma_end=ends
        )
        self._counts = [len(layer) for layer in layers]
        return torch.stack([table.view(steps, rows, -1) for layer in layers for table in layer], dim=1)


def _padded(counts: Tensor, places: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, places - counts.shape[0]))


def _conditioning(layout: PackedLayout, clean: Tensor | None) -> Conditioning:
    ones = torch.ones(layout.max_segments, dtype=torch.float32, device=layout.device)
    if clean is None:
        # Not in the layout's own tensors: a compiled graph would take it that there are as many rows as segments.
        return Conditioning.per_segment(ones, layout)._map(torch.clone)
    return Conditioning.with_clean(ones, clean, layout)


def _strength(videos: Sequence[Tensor], guidance: Sequence[float], model: SoraDiT) -> Tensor:
    """Guidance − 1 over the network's output for these videos. Not of a learned variance, which it would extrapolate
    out of its bounds."""
    if len(set(guidance)) == 1 and not model.config.learned_sigma:
        return torch.tensor([guidance[0] - 1], dtype=torch.float32, device="cpu")
    parts = []
    for video, scale in zip(videos, guidance, strict=True):
        parts.append(torch.full((video.numel(),), scale - 1, dtype=torch.float32, device="cpu"))
        if model.config.learned_sigma:
            parts.append(torch.zeros(video.numel(), dtype=torch.float32, device="cpu"))
    return torch.cat(parts)
