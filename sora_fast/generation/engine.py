"""Engine: a trained run in, videos out."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sora_fast.diffusion.flow_map import FlowMap
from sora_fast.diffusion.paths import RectifiedFlow
from sora_fast.diffusion.samplers import (
    DDIM,
    Ancestral,
    DPMSolver2M,
    Euler,
    Heun,
    Sampler,
)
from sora_fast.generation.compiling import any_sizes, compile_blocks, is_worth_it
from sora_fast.generation.forecast import Forecast
from sora_fast.generation.job import Job
from sora_fast.generation.latency import Clock, Latency
from sora_fast.generation.made import Made
from sora_fast.generation.phases import Plan
from sora_fast.generation.step import StepGraphs
from sora_fast.generation.tasks import Request, pack_requests
from sora_fast.graphs import CudaRecorder
from sora_fast.packing import PackedLayout, token_grid
from sora_fast.proof import prove_at_start
from sora_fast.training import checkpoint
from sora_fast.training.distributed import local_rank
from sora_fast.training.run import CHECKPOINTS, Networks, RunConfig, moved, read_run

log = logging.getLogger(__name__)

SAMPLERS: dict[str, Sampler] = {
    "euler": Euler(),
    "heun": Heun(),
    "ddim": DDIM(),
    "dpm++": DPMSolver2M(),
    "ddpm": Ancestral(),
    "flow-map": FlowMap(),
}
STEPS = 30


def default_steps(config: RunConfig) -> int:
    """Of the sampler, where nothing is said."""
    return STEPS if config.distilled is None else config.distilled.steps


class Engine:
    """Makes videos with trained networks; all requests of a call are packed into one sequence.

    networks: as the trainer has them; put into evaluation mode and moved to `device`.
    compile: the model's blocks, with torch.compile; None: on a CPU, as soon as the steps that are asked for are enough
        to save the start-up (see compiling.py), never on a GPU nor in deterministic mode, since it rounds differently.
    graph: launch a step as one CUDA graph, from the third step of its kind on: packs then take a little more room than
        they need, so that many share a graph (see room.py). None: on a GPU; ValueError where there is none. A call with
        a cache has none. What cannot be captured, or gives something else when it is first held to the step itself,
        runs without, with a warning.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        device: torch.device | str = "cpu",
        compile: bool | None = None,
        graph: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        prove_at_start(self.device, networks.config.dtypes, leads=local_rank() == 0)
        self.networks = networks.to(self.device).eval().requires_grad_(False)
        self.latency = Latency()
        self.compiled = False
        self._may_compile = compile is None and self.device.type == "cpu"
        self._spent = 0.0  # seconds of the network, in eager mode
        if compile:
            self.compiled = compile_blocks(self.networks.model)
        if graph is None:
            graph = self.device.type == "cuda"
        self._graphs = StepGraphs(CudaRecorder(self.device)) if graph else None
        self._said: set[str] = set()

    @staticmethod
    def load(
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        text_encoder: Path | str | None = None,
        codec: Path | str | None = None,
        compile: bool | None = None,
        graph: bool | None = None,
    ) -> "Engine":
        """The newest averaged weights of a run's folder. ValueError if it holds no run or no checkpoint.

        text_encoder, codec: where the folder of the run's text encoder or codec is, if not where it was. ValueError if
        it is another.
        compile, graph: as of the engine.
        """
        folder = Path(folder)
        config = moved(read_run(folder), text_encoder=text_encoder, codec=codec)
        saved = checkpoint.latest(folder / CHECKPOINTS, groups=("ema",))
        if saved is None:
            raise ValueError(f"{folder} holds no checkpoint yet; train it first")
        networks = Networks(config)
        take_weights(networks.trained(), saved.tensors["ema"], folder)
        return Engine(networks, device=device, compile=compile, graph=graph)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        cache: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """A video (C, T, H, W), float in [-1, 1] on the CPU, for each request.

        Guidance, and prompts, that the networks were not trained for are named in the log, once. Given frames come back
        bit for bit if the codec is the identity. `self.latency` then says where the time went.

        steps: of the sampler, for requests that do not say themselves; None: 30, or what a run was distilled for.
        sampler: default: Euler for a rectified flow, DDIM for DDPM, FlowMap for a distilled run. cache: threshold of
        the first-block cache (see `FirstBlockCache`), such as 0.2; 0: none, and the same bits as without. progress:
        called with (steps done, steps).
        With torch.use_deterministic_algorithms(True) a video's bits do not depend on what else is asked for: products
        of few rows are summed in another order than those of many, so every request gets a pack of its own, and the
        gain of packing is lost; `self.latency` is the last one's. Without it they differ by rounding.
        """
        options = {"steps": steps, "sampler": sampler, "cache": cache, "progress": progress}
        if torch.are_deterministic_algorithms_enabled() and len(requests) > 1:
            return [self.generate([request], **options)[0] for request in requests]
        made = self.make(requests, **options)
        clock = Clock()
        decoded = self.networks.codec.decode_all([one.latents for one in made], [one.size for one in made])
        videos = [video.cpu() for video in decoded]
        self.latency.decoded = clock.lap()
        return videos

    @torch.no_grad()
    def make(
        self,
        requests: Sequence[Request],
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        cache: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Made]:
        """All but the decoding of `generate`, whose arguments these are, of one pack: who writes frames as they come
        needs no room for all of them."""
        self.latency, clock = Latency(), Clock()
        half = self.networks.config.train.precision == "bfloat16"
        with any_sizes(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            job = self._prepare(requests, steps, sampler, cache)
            self.latency.prepared = clock.lap()
            for done in job.steps():
                self.latency.steps.append(clock.lap())
                self._decide(job.plan.steps - done)
                if progress is not None:
                    progress(done, job.plan.steps)
            latents = job.finish()
        codec = self.networks.codec
        return [
            Made(codec, one, (request.frames, request.height, request.width))
            for one, request in zip(latents, requests, strict=True)
        ]

    def forecast(
        self, requests: Sequence[Request], *, steps: int | None = None, sampler: Sampler | None = None
    ) -> Forecast:
        """What `generate` will do if it is asked the same."""
        networks = self.networks
        spec = networks.codec.spec
        shapes = [spec.latent_shape(request.frames, request.height, request.width) for request in requests]
        grids = [token_grid(shape, networks.patch_size) for shape in shapes]
        # Levels follow from the grids alone: no token needs a place yet, of however many.
        layout = replace(PackedLayout.from_grids([(1, 1, 1)] * len(grids)), grids=torch.tensor(grids, device="cpu"))
        plan = self._plan(requests, layout, self._sampler(sampler), steps)
        return Forecast.of(networks.model, plan, [math.prod(grid) for grid in grids])

    def _sampler(self, sampler: Sampler | None) -> Sampler:
        distilled = self.networks.config.distilled
        if distilled is not None and (sampler is None or sampler.tells_end):
            return FlowMap(distilled.spacing)
        if distilled is not None:
            self._say_once(
                "the run is distilled: it is to be told where each step leads, which no sampler but its own (flow-map) "
                "does; the clips of others are likely worse"
            )
        sampler = sampler or (Euler() if isinstance(self.networks.path, RectifiedFlow) else DDIM())
        if sampler.tells_end:
            raise ValueError(f"sampler: {type(sampler).__name__} needs a distilled run; `sora-fast distill` makes one")
        return sampler

    def _plan(self, requests: Sequence[Request], layout: PackedLayout, sampler: Sampler, steps: int | None) -> Plan:
        config = self.networks.config
        guidance = config.text is not None and config.distilled is None
        steps = default_steps(config) if steps is None else steps
        return Plan.of(requests, layout, self.networks.path, sampler, steps=steps, guidance=guidance)

    def _decide(self, left: int) -> None:
        """Compile, if what took so long so far and what is left of this call are worth it."""
        if not self._may_compile or self.compiled or torch.are_deterministic_algorithms_enabled():
            return
        self._spent += self.latency.steps[-1]
        if left and is_worth_it(self._spent + left * self.latency.steps[-1]):
            self._may_compile = False
            self.compiled = compile_blocks(self.networks.model)

    def _prepare(self, requests: Sequence[Request], steps: int | None, sampler: Sampler | None, cache: float) -> Job:
        networks, sampler = self.networks, self._sampler(sampler)
        self._say_what_is_not_used(requests)
        text = None
        if networks.text is not None:
            ids, layout = networks.text.tokenize([*(request.prompt for request in requests), ""])
            text = networks.text(ids.to(self.device), layout.to(self.device))
        packed = pack_requests(requests, codec=networks.codec, patch_size=networks.patch_size).to(self.device)
        plan = self._plan(requests, packed.layout, sampler, steps)
        return Job(
            networks.model,
            plan,
            packed,
            text,
            networks.path,
            sampler,
            latency=self.latency,
            cache=cache,
            graphs=self._graphs,
        )

    def _say_what_is_not_used(self, requests: Sequence[Request]) -> None:
        guided = any(request.guidance != 1 for request in requests)
        distilled = self.networks.config.distilled
        if guided and distilled is not None:
            self._say_once(
                f"the run is distilled, with a guidance of {distilled.guidance:g} in its weights "
                f"({distilled.guidance_given:g} where frames are given): the guidance asked for is not used"
            )
        elif self.networks.text is None and (guided or any(request.prompt for request in requests)):
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


@torch.no_grad()
def take_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Fill parameters with weights of the same names and shapes; ValueError if they are others."""
    expected, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (parameters, weights))
    if wrong := sorted(name for name, _ in expected.items() ^ found.items()):
        raise ValueError(f"the checkpoint of {folder} is not of the model that its config.json describes: {wrong[0]}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
