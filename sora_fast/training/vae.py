"""Training a CausalVideoVAE: the trainer, with another network and another loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sora_fast.models.codecs import IdentityCodec
from sora_fast.models.video_vae import TEMPORAL_STRIDE, CausalVideoVAE, Past, VAEConfig
from sora_fast.packing import RaggedLatents
from sora_fast.packing._bundle import TensorBundle
from sora_fast.training import checkpoint
from sora_fast.training.data.batch import Batch
from sora_fast.training.data.crops import crops_of
from sora_fast.training.data.sources import Source
from sora_fast.training.flops import Flops
from sora_fast.training.precision import computing
from sora_fast.training.step import reseed
from sora_fast.training.trainer import Trainer
from sora_fast.training.vae_run import VAERunConfig
from sora_fast.training.watchers import Watcher

# The latents' mean and square are those of so many steps, about.
_STEPS = 100


class VAENetworks(nn.Module):
    """The network as the trainer wants it: with what makes its batches, videos behind copies of their first frames."""

    text = path = None

    def __init__(self, config: VAERunConfig) -> None:
        super().__init__()
        self.config = config
        stride = config.model.spatial_stride
        self.patch_size = (TEMPORAL_STRIDE, stride, stride)
        self.codec = IdentityCodec.for_patches(config.model.video_channels, self.patch_size)
        self.vae = CausalVideoVAE(config.model)

    def no_prompts(self, batch: Any) -> None:
        """It reads none."""

    def trained(self) -> dict[str, nn.Parameter]:
        """By name: what a checkpoint holds."""
        return dict(self.named_parameters())


@dataclass(frozen=True, eq=False)
class FrameGroup(TensorBundle):
    """Videos of one height and width. frames: [F, C, H, W], one after the other; lengths: of each, latent frames.

    counts: [F] bool, whether a frame is one of the video, and no copy. noise: of the latents.
    """

    frames: Tensor
    counts: Tensor
    noise: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FramePack(TensorBundle):
    """All that the loss of a pack depends on, beside the weights."""

    groups: tuple[FrameGroup, ...]


class VAELoss(nn.Module):
    """FramePack → (the mean over the pixels, [] float32; their number, [] int64).

    Of what: see `VAERunConfig`. mean, square: [C], of the latents in the last steps; noted: how many there were.
    """

    def __init__(self, networks: VAENetworks, precision: str) -> None:
        super().__init__()
        self.networks, self.precision = networks, precision
        channels = networks.config.model.channels
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("noted", torch.zeros(()))

    def forward(self, pack: FramePack) -> tuple[Tensor, Tensor]:
        error = divergence = 0.0
        codes, pixels = [], sum(group.counts.sum() * group.frames[0].numel() for group in pack.groups)
        for group in pack.groups:
            with computing(self.precision, group.frames.device.type):
                mean, log_variance = self.networks.vae.encode(group.frames, Past(group.lengths))
                latents = mean + (log_variance / 2).exp() * group.noise
                made = self.networks.vae.decode(latents, Past(group.lengths))
            off = (made.float() - group.frames).abs() * group.counts.view(-1, 1, 1, 1)
            error = error + off.square().sum() + self.networks.config.absolute * off.sum()
            mean, log_variance = mean.float(), log_variance.float()
            divergence = divergence + (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
            codes.append(mean.detach().transpose(0, 1).flatten(1))
        self._note(torch.cat(codes, dim=1))
        numbers = sum(group.noise.numel() for group in pack.groups)
        return error / pixels + self.networks.config.kl * divergence / numbers, pixels

    @torch.no_grad()
    def _note(self, codes: Tensor) -> None:
        """codes: [C, N]. What is not finite leaves all as it is."""
        sound = codes.isfinite().all()
        weight = sound / (1 + self.noted.clamp(max=_STEPS - 1))
        codes = torch.where(sound, codes, 0.0)
        self.mean.lerp_(codes.mean(1), weight)
        self.square.lerp_(codes.square().mean(1), weight)
        self.noted.add_(sound)

    def latents(self) -> dict[str, Tensor]:
        """Mean and deviation of each channel."""
        return {"mean": self.mean, "std": (self.square - self.mean.square()).clamp(min=1e-8).sqrt()}


class VAETrainer(Trainer):
    """Trains a CausalVideoVAE on parts of a source's videos (see crops.py); all that is not said here is as in
    `Trainer`. A step that is not finite is left out as there, but is not kept for a replay.

    Of several workers, the first one's latents are those whose mean and deviation are kept.
    """

    def __init__(
        self,
        config: VAERunConfig,
        source: Source,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        resume: bool = False,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        crops = crops_of(source, config.crops, config.train.seed)
        super().__init__(config, crops, folder, device=device, resume=resume, watchers=watchers)

    def _built(self, config: VAERunConfig) -> VAENetworks:
        return VAENetworks(config)

    def _counted(self) -> "VAEFlops":
        return VAEFlops(self.networks.config.model)

    def _applied(self, loss: nn.Module) -> VAELoss:
        return VAELoss(self.networks, self.config.precision).to(self.device)

    def _further(self) -> dict[str, dict[str, Tensor]]:
        return {"latents": self.loss.latents() | {name: getattr(self.loss, name) for name in ("square", "noted")}}

    def _take_in(self, saved: checkpoint.Checkpoint) -> None:
        for name in ("mean", "square", "noted"):
            getattr(self.loss, name).copy_(saved.tensors["latents"][name])

    def _packs(self, batches: Sequence[Batch]) -> list[FramePack]:
        reseed(self.generator, (self.config.seed, self.step, self.world.rank))
        return [self._pack(batch.latents) for batch in batches]

    def _pack(self, videos: RaggedLatents) -> FramePack:
        """On the device, of videos that are still on the host."""
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for video in videos.to_list():
            alike.setdefault(tuple(video.shape[2:]), []).append(video.transpose(0, 1))
        return FramePack(tuple(self._group(frames) for frames in alike.values()))

    def _group(self, videos: Sequence[Tensor]) -> FrameGroup:
        frames, lengths = torch.cat(list(videos)), tuple(len(video) // TEMPORAL_STRIDE for video in videos)
        counts = torch.cat([torch.arange(len(video)) >= TEMPORAL_STRIDE - 1 for video in videos])
        c = self.networks.config.model
        height, width = (side // c.spatial_stride for side in frames.shape[2:])
        sizes = (sum(lengths), c.channels, height, width)
        noise = torch.randn(sizes, device=self.device, generator=self.generator)
        on_device = (x.to(self.device, non_blocking=True) for x in (frames, counts))
        return FrameGroup(*on_device, noise, lengths)

    def _keep(self, error: FloatingPointError) -> None:
        if self.leads:
            self._log.flush(self.seconds)


class VAEFlops:
    """Counts products, as `FlopCount` does for a SoraDiT: so many for each latent pixel."""

    SIDE = 8  # latent pixels of the frame that is counted on

    def __init__(self, config: VAEConfig) -> None:
        side = self.SIDE * config.spatial_stride
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = CausalVideoVAE(config)
            mean, _ = network.encode(torch.empty(TEMPORAL_STRIDE, config.video_channels, side, side), Past([1]))
            network.decode(mean, Past([1]))
        self.each = counter.get_total_flops() // self.SIDE**2

    def batch(self, batch: Batch) -> Flops:
        """Of a batch that has not left the host."""
        return Flops(self.each * batch.useful, 0)
