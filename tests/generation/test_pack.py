"""A step on what was prepared: as without, to rounding, and free of reads on the host."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sora_fast.diffusion import Euler, Guided, noise_like, sample
from sora_fast.generation.engine import Engine
from sora_fast.generation.job import Job
from sora_fast.generation.latency import Latency
from sora_fast.generation.phases import Plan
from sora_fast.generation.step import Step, StepInputs
from sora_fast.generation.tasks import PackedRequests, Request, pack_requests
from sora_fast.models.text import PackedText
from tests.generation.random_engine import random_engine

REQUESTS = [
    Request("left", 3, 10, 14, guidance=2.0, seed=1),
    Request("right", 1, 16, 8, guidance=3.0, seed=2),
    Request("on", 4, 8, 8, head=torch.linspace(-1, 1, 64).view(1, 1, 8, 8), guidance=1.5, seed=3),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine()


def uncached(engine: Engine, requests: list[Request], steps: int) -> list[Tensor]:
    """With the model as it is for training: all anew in every step."""
    networks = engine.networks
    packed = pack_requests(requests, codec=networks.codec, patch_size=networks.patch_size)

    def text(prompts: list[str]) -> PackedText:
        return networks.text(*networks.text.tokenize(prompts))

    scale = torch.tensor([request.guidance for request in requests])
    prompts = text([request.prompt for request in requests])
    denoiser = Guided(networks.model, packed.layout, scale=scale, text=prompts, null_text=text([""] * len(requests)))
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    noise = packed.data.with_flat(noise_like(packed.data, generators))
    options = {"steps": steps, "patch_size": networks.patch_size, "data": packed.data, "clean": packed.clean}
    made = sample(denoiser, noise, packed.layout, networks.path, Euler(), **options)
    return [networks.codec.decode(video) for video in made.to_list()]


@torch.no_grad()
def test_prepared_as_unprepared(engine: Engine) -> None:
    made = engine.generate(REQUESTS, steps=4)
    for ours, theirs in zip(made, uncached(engine, REQUESTS, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def job(engine: Engine, requests: list[Request], steps: int = 3) -> Job:
    networks = engine.networks
    packed: PackedRequests = pack_requests(requests, codec=networks.codec, patch_size=networks.patch_size)
    text = networks.text(*networks.text.tokenize([*(request.prompt for request in requests), ""]))
    plan = Plan.of(requests, packed.layout, networks.path, Euler(), steps=steps)
    return Job(networks.model, plan, packed, text, networks.path, Euler(), latency=Latency())


@torch.no_grad()
def test_a_step_reads_nothing_on_the_host(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta" there is nothing to be read: what passes there can be captured as a graph."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    (stage,) = job(engine, REQUESTS)._stages
    x = stage.pack.state.flat
    given = StepInputs(x, stage.numbers[1], (stage.modulations[1],), stage.pack.seen, stage.descent)
    step = Step(random_engine().networks.model.to("meta").denoise, engine.networks.path, last=False)
    made, _ = step(given._map(lambda tensor: torch.empty_like(tensor, device="meta")))
    assert made.is_meta and made.shape == x.shape


def test_modulations_of_many_steps_are_made_in_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job(engine, REQUESTS, 5)._stages[0].modulations
    monkeypatch.setattr("sora_fast.generation.pack._MOST_NUMBERS", 1)
    parts = job(engine, REQUESTS, 5)._stages[0].modulations
    for step in (0, 3, 4, 1):
        torch.testing.assert_close(whole[step], parts[step], rtol=1e-5, atol=1e-5)


def test_outside_the_interval_nothing_is_computed_without_a_prompt(engine: Engine) -> None:
    asked = replace(REQUESTS[0], guidance_interval=(0.0, 0.0))
    (none,) = engine.generate([asked], steps=4)
    tokens = engine.latency.tokens
    (plain,) = engine.generate([replace(REQUESTS[0], guidance=1.0)], steps=4)
    assert torch.equal(none, plain) and tokens == engine.latency.tokens
    (some,) = engine.generate([replace(asked, guidance_interval=(0.6, 1.0))], steps=4)
    assert engine.latency.tokens == 1.5 * tokens
    (all_levels,) = engine.generate(REQUESTS[:1], steps=4)
    assert engine.latency.tokens == 2 * tokens
    assert (some - plain).abs().max() > 1e-3 and (some - all_levels).abs().max() > 1e-3


def test_requests_of_other_step_counts_and_intervals_share_a_pack(engine: Engine) -> None:
    asked = [
        replace(REQUESTS[0], steps=2),
        replace(REQUESTS[1], guidance_interval=(0.4, 0.8)),
        replace(REQUESTS[2], steps=5, guidance=1.0),
    ]
    for request, video in zip(asked, engine.generate(asked, steps=4), strict=True):
        (alone,) = engine.generate([request], steps=4)
        torch.testing.assert_close(video, alone, rtol=0, atol=2e-5)
    assert torch.equal(video[:, :1], REQUESTS[2].head)
