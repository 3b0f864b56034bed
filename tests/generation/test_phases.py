import pytest
import torch

from sora_fast.diffusion import DDPM, Euler, NoisePath, RectifiedFlow
from sora_fast.generation.phases import Phase, Plan
from sora_fast.generation.tasks import Request
from sora_fast.packing import PackedLayout

GRIDS = [(2, 2, 2), (4, 4, 4), (1, 2, 2)]
FLOW = RectifiedFlow()
LENGTHS = [8, 64, 4]


def plan(*requests: Request, steps: int = 4, path: NoisePath = FLOW, **options: bool) -> Plan:
    layout = PackedLayout.from_grids(GRIDS[: len(requests)])
    return Plan.of(requests, layout, path, Euler(), steps=steps, **options)


def request(**options: object) -> Request:
    return Request("", 1, 4, 4, **options)


def test_requests_leave_when_they_are_done() -> None:
    made = plan(request(steps=2), request(guidance=2.0), request(steps=3, guidance=3.0))
    assert made.counts == (2, 4, 3) and made.steps == 4
    assert made.phases == (
        Phase(range(0, 2), (1, 2), (0,)),
        Phase(range(2, 3), (1, 2), ()),
        Phase(range(3, 4), (1,), ()),
    )
    assert made.phases[0].requests == (1, 2, 0)
    assert made.tokens(LENGTHS) == 2 * (8 + 2 * 64 + 2 * 4) + 2 * (64 + 4) + 2 * 64


def test_levels_are_each_request_s_own() -> None:
    path = RectifiedFlow(base_tokens=8)
    made = plan(request(steps=2), request(), path=path)
    layout = PackedLayout.from_grids(GRIDS[:2])
    assert torch.equal(made.sigmas[:3, 0], path.sigmas(2, layout)[:, 0]) and not made.sigmas[3:, 0].any()
    assert torch.equal(made.sigmas[:, 1], path.sigmas(4, layout)[:, 1])


def test_guidance_in_an_interval() -> None:
    """Levels 1, 0.75, 0.5, 0.25; both ends of the interval count."""
    made = plan(request(guidance=2.0, guidance_interval=(0.5, 0.8)), request(guidance=2.0))
    assert made.phases == (
        Phase(range(0, 1), (1,), (0,)),
        Phase(range(1, 3), (0, 1), ()),
        Phase(range(3, 4), (1,), (0,)),
    )


def test_a_model_without_prompts_is_not_guided() -> None:
    made = plan(request(guidance=2.0), guidance=False)
    assert made.phases == (Phase(range(0, 4), (), (0,)),)


def test_errors() -> None:
    with pytest.raises(TypeError, match="needs a RectifiedFlow path"):
        plan(request(), path=DDPM())
    with pytest.raises(ValueError, match=r"guidance_interval: \(0.5, 0.2\)"):
        request(guidance_interval=(0.5, 0.2))
    with pytest.raises(ValueError, match="steps: 0"):
        request(steps=0)
