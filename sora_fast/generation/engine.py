"""Engine: a trained run in, videos out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sora_fast.diffusion.guidance import Guided
from sora_fast.diffusion.noise import noise_like
from sora_fast.diffusion.paths import RectifiedFlow
from sora_fast.diffusion.samplers import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    Euler,
    Heun,
    Sampler,
)
from sora_fast.diffusion.sampling import Denoiser, sample
from sora_fast.diffusion.scheduled import scheduled
from sora_fast.generation.tasks import Request, pack_requests
from sora_fast.models import PackedText
from sora_fast.packing import PackedLayout
from sora_fast.proof import prove_at_start
from sora_fast.training import checkpoint
from sora_fast.training.distributed import local_rank
from sora_fast.training.run import CHECKPOINTS, Networks, moved, read_run

log = logging.getLogger(__name__)

SAMPLERS: dict[str, Sampler] = {
    "euler": Euler(),
    "heun": Heun(),
    "ddim": DDIM(),
    "dpm++": DPMSolver2M(),
    "ddpm": Ancestral(),
}


class Engine:
    """Makes videos with trained networks; all requests of a call are packed into one sequence.

    networks: as the trainer has them; put into evaluation mode and moved to `device`.
    """

    def __init__(self, networks: Networks, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        prove_at_start(self.device, networks.config.dtypes, leads=local_rank() == 0)
        self.networks = networks.to(self.device).eval().requires_grad_(False)
        self._said: set[str] = set()

    @staticmethod
    def load(
        folder: Path | str, *, device: torch.device | str = "cpu", text_encoder: Path | str | None = None
    ) -> "Engine":
        """The newest averaged weights of a run's folder. ValueError if it holds no run or no checkpoint.

        text_encoder: where the folder of the run's text encoder is, if not where it was. ValueError if it is another.
        """
        folder = Path(folder)
        config = moved(read_run(folder), text_encoder=text_encoder)
        saved = checkpoint.latest(folder / CHECKPOINTS, groups=("ema",))
        if saved is None:
            raise ValueError(f"{folder} holds no checkpoint yet; train it first")
        networks = Networks(config)
        _take(networks.trained(), saved.tensors["ema"], folder)
        return Engine(networks, device=device)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        steps: int = 30,
        sampler: Sampler | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """A video (C, T, H, W), float in [-1, 1] on the CPU, for each request.

        Guidance, and prompts, that the networks were not trained for are named in the log, once.
        steps: of the sampler; default: Euler for a rectified flow, DDIM for DDPM. progress: called with (steps done,
        steps). Given frames come back bit for bit if the codec is the identity.
        """
        networks = self.networks
        packed = pack_requests(requests, codec=networks.codec, patch_size=networks.patch_size).to(self.device)
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        if sampler is None:
            sampler = Euler() if isinstance(networks.path, RectifiedFlow) else DDIM()
        half = networks.config.train.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            made = sample(
                self._denoiser(requests, packed.layout),
                packed.data.with_flat(noise_like(packed.data, generators)),
                packed.layout,
                networks.path,
                sampler,
                steps=steps,
                patch_size=networks.patch_size,
                data=packed.data,
                clean=packed.clean,
                generator=generators,
                progress=progress,
            )
        return [networks.codec.decode(latents).cpu() for latents in made.to_list()]

    def _denoiser(self, requests: Sequence[Request], layout: PackedLayout) -> Denoiser:
        model = self.networks.model
        self._say_what_is_not_used(requests)
        if self.networks.text is None:
            return model
        text = self._text([request.prompt for request in requests])
        scale = torch.tensor([request.guidance for request in requests], dtype=torch.float32, device="cpu")
        if bool((scale == 1).all()):
            return partial(scheduled(model, layout, text.layout), text=text)
        null_text = self._text([""] * len(requests))
        # Not a learned variance: extrapolated, it would leave its bounds.
        channels = model.config.in_channels
        return Guided(model, layout, scale=scale, text=text, null_text=null_text, channels=channels)

    def _say_what_is_not_used(self, requests: Sequence[Request]) -> None:
        guided = any(request.guidance != 1 for request in requests)
        if self.networks.text is None and (guided or any(request.prompt for request in requests)):
            self._say_once("the model was trained without a text encoder: prompts and guidance are not used")
        elif guided and self.networks.config.train.batch.caption_dropout == 0:
            self._say_once(
                "the model was trained with a caption dropout of 0: unless files had no caption, it does not know what "
                "no prompt means, which guidance leads away from; a guidance of 1 does without"
            )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message)

    def _text(self, prompts: list[str]) -> PackedText:
        ids, layout = self.networks.text.tokenize(prompts)
        return self.networks.text(ids.to(self.device), layout.to(self.device))


@torch.no_grad()
def _take(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Fill parameters with weights of the same names and shapes; ValueError if they are others."""
    expected, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (parameters, weights))
    if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
        raise ValueError(f"the checkpoint of {folder} is not of the model that its config.json describes: {wrong[0]}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
