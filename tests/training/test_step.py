from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sora_fast.graphs import Graph
from sora_fast.ops import _attention_device
from sora_fast.training import optim
from sora_fast.training.step import NoisyPack, PackLoss, StepPacks, WholeStep, drawn, take_gradients, update
from tests.recording import FakeRecorder
from tests.tracing import Calls
from tests.training.packs import joined, networks, pack

Side = tuple[dict[str, nn.Parameter], list[Any], optim.WeightAverage]


def _training(of: Any, optimizer: str = "adamw", **options: Any) -> Side:
    parameters = of.trained()
    optimizers = optim.build_optimizers(parameters, optimizer, lr=1e-2, weight_decay=0.1, **options)
    return parameters, optimizers, optim.WeightAverage(parameters, 0.9)


def _state(parameters: dict[str, nn.Parameter], optimizers: list[Any], average: optim.WeightAverage) -> list[Tensor]:
    parts = (parameters, optim.optimizer_tensors(optimizers, parameters), average.tensors)
    return [value.detach().clone() for named in parts for value in named.values()]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_packs_one_after_the_other_are_one_pack_of_them_all() -> None:
    loss_of = PackLoss(networks(), "float32")
    parameters = list(loss_of.networks.trained().values())
    packs = [pack(loss_of.networks, seed) for seed in (1, 4, 5)]
    losses, counts = zip(*(loss_of(given) for given in packs), strict=True)
    assert len(set(map(int, counts))) == 3, "of unequal weight"
    whole = take_gradients(loss_of, [joined(joined(packs[0], packs[1]), packs[2])], parameters)
    expected = [p.grad.clone() for p in parameters]
    loss_of.networks.zero_grad()
    parts = take_gradients(loss_of, packs, parameters)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert parts.item() != pytest.approx(torch.stack(losses).mean().item(), rel=1e-3), "not the mean of means"
    for one, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(one.grad, other, rtol=1e-4, atol=1e-7)


def test_several_packs_of_several_workers() -> None:
    """What each gives to `World.mean` is, weighted as that does, the one mean over the pixels of them all."""
    loss_of = PackLoss(networks(), "float32")
    parameters = list(loss_of.networks.trained().values())
    packs = [pack(loss_of.networks, seed) for seed in (1, 4, 5, 7)]
    given: list[tuple[list[Tensor], Tensor]] = []

    class _Worker:
        def mean(self, tensors: list[Tensor], weight: Tensor) -> None:
            given.append(([tensor.clone() for tensor in tensors], weight))

    for mine in (packs[:2], packs[2:]):
        loss_of.networks.zero_grad()
        take_gradients(loss_of, mine, parameters, _Worker())  # type: ignore[arg-type]
    loss_of.networks.zero_grad()
    pairs = [joined(*packs[:2]), joined(*packs[2:])]
    whole = take_gradients(loss_of, [joined(*pairs)], parameters)
    weights = [weight for _, weight in given]
    assert weights[0] != weights[1]
    pairs_of_means = zip(given[0][0], given[1][0], strict=True)
    means = [(weights[0] * one + weights[1] * other) / sum(weights) for one, other in pairs_of_means]
    torch.testing.assert_close(means, [whole, *(p.grad for p in parameters)], rtol=1e-4, atol=1e-7)


def test_packs_without_a_pixel_to_learn_from() -> None:
    loss_of = PackLoss(networks(), "float32")
    parameters = list(loss_of.networks.trained().values())
    empty = pack(loss_of.networks, 1)
    empty.clean.fill_(True)
    for packs in ([empty], [empty, empty]):
        loss_of.networks.zero_grad()
        assert take_gradients(loss_of, packs, parameters) == 0
        assert all(not p.grad.count_nonzero() for p in parameters)


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
@pytest.mark.parametrize("spoiled", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, spoiled: str) -> None:
    """And one that is finite is to the bit what it is without any guard."""
    torch.manual_seed(0)
    net, plain = (nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])}) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    sides = [_training(_Trained(module), optimizer) for module in (net, plain)]

    def gradients(step: int) -> None:
        for side in sides:
            generator = torch.Generator().manual_seed(step)
            for parameter in side[0].values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)

    for step in range(4):
        gradients(step)
        if step == 2:
            before = _state(*sides[0])
            bad = float("nan" if spoiled == "loss" else 1)
            if spoiled == "gradient":
                next(reversed(sides[0][0].values())).grad[3] = float("inf")
            sides[0][2].set_step(step)
            _, skipped = update(*sides[0], torch.tensor(bad), clip_norm=1.0)
            assert skipped
            assert _same(_state(*sides[0]), before)
            assert all(p.grad is None for p in sides[0][0].values())
            continue
        for _, _, average in sides:
            average.set_step(step)
        norm, skipped = update(*sides[0], torch.tensor(1.0), clip_norm=1.0)
        assert not skipped and norm > 1
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for each in sides[1][1]:
            each.step()
        sides[1][2].update()
        assert _same(_state(*sides[0]), _state(*sides[1]))


class _Trained:
    def __init__(self, module: nn.Module) -> None:
        self.trained = lambda: dict(module.named_parameters())


def _on_meta(bundle: NoisyPack) -> NoisyPack:
    return bundle._map(lambda tensor: torch.empty_like(tensor, device="meta"))


@pytest.mark.parametrize(("optimizer", "packs"), [("adamw", 1), ("muon", 2)])
def test_nothing_of_a_step_is_read_on_the_host(optimizer: str, packs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta" there is nothing to be read: a value asked for, and a shape or a branch that depends on one, raise.

    FlexAttention refuses tracers, and has a stand-in; it is seen to read nothing in tests/ops/test_host_reads.py.
    So pass the loss, the backward pass, clipping, optimizer and averaging; in float32: there is no autocast on "meta".
    """
    monkeypatch.setattr(_attention_device, "attention", lambda q, k, v, *_, **__: q + k.mean() + v.mean())
    checks = import_module("torch.optim.optimizer")  # which torch.optim hides
    monkeypatch.setattr(checks, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    made = networks()
    given = [_on_meta(pack(made, seed)) for seed in range(3 * packs)]
    made = made.to("meta")
    loss_of, sides, traces = PackLoss(made, "float32"), _training(made, optimizer), []
    for step in range(3):
        sides[2].set_step(step + 5)
        with Calls() as calls:
            loss = take_gradients(loss_of, given[step * packs : (step + 1) * packs], list(sides[0].values()))
            update(*sides, loss, clip_norm=1.0)
        traces.append(calls.made)
    # The first step makes the optimizer's state.
    assert len(traces[2]) > 100 and traces[1] == traces[2]


@pytest.mark.parametrize(("optimizer", "packs"), [("adamw", 1), ("muon", 2)])
def test_a_whole_step_as_a_graph(optimizer: str, packs: int) -> None:
    """With a stand-in for CUDA's capture: packs, learning rates and averaging weights change, a step is not finite, and
    weights, optimizer and average are to the bit what they are without."""
    sides, steps, recorder = [], [], FakeRecorder()
    for _ in range(2):
        made = networks()
        sides.append(_training(made, optimizer, capturable=True))
        steps.append(WholeStep(PackLoss(made, "float32"), *sides[-1], clip_norm=1.0))
    graph = Graph(steps[0], recorder)
    for step in range(8):
        given = StepPacks(tuple(pack(made, seed) for seed in range(step * packs, (step + 1) * packs)))
        if step == 5:
            given.packs[0].latents.flat[:] = float("nan")
        for _, optimizers, average in sides:
            optim.set_lr(optimizers, 1e-2 / (1 + step))
            average.set_step(step)
        results = [take(given) for take in (graph, steps[1])]
        assert torch.equal(torch.stack(results[0]), torch.stack(results[1])) or step == 5
        assert bool(results[0][2]) == bool(results[1][2]) == (step == 5)
        assert _same(*(_state(*side) for side in sides))
    assert len(recorder.tapes) == 1 and graph.replays == 6


@pytest.mark.parametrize("spoil", [lambda loss: loss.item(), lambda loss: loss.nonzero(), lambda loss: bool(loss > 0)])
def test_a_read_would_be_seen(spoil: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        spoil(torch.ones((), device="meta"))


def test_what_is_drawn_depends_on_the_entropy_alone() -> None:
    of, generator = networks(), torch.Generator()
    batch = pack(of, 1)
    made = [drawn(batch, of.path, generator, entropy, 0.5) for entropy in ((0, 1, 0), (0, 1, 0), (0, 1, 0, 1))]
    assert torch.equal(made[0].noise, made[1].noise) and torch.equal(made[0].sigma, made[1].sigma)
    assert not torch.equal(made[0].noise, made[2].noise)
