import pytest
import torch
from torch import nn

from sora_fast.training import optim


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.embed(index)
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def _parameters(seed: int) -> tuple[_Net, dict[str, nn.Parameter]]:
    torch.manual_seed(seed)
    net = _Net()
    return net, dict(net.named_parameters())


def _train(net: _Net, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for _ in range(steps):
        net(torch.arange(5)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("decay", optim.DECAYS)
def test_schedule(decay: str) -> None:
    schedule = optim.Schedule(warmup=4, decay=decay)
    warm = [schedule(step, 0.0) for step in range(6)]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    end = 1.0 if decay == "constant" else 0.0
    assert schedule(10, 1.0) == pytest.approx(end)
    assert schedule(10, 1.7) == pytest.approx(end)
    assert schedule(10, 0.5) == pytest.approx(1.0 if decay == "constant" else 0.5)


def test_schedule_rejects() -> None:
    with pytest.raises(ValueError, match="decay must be one of cosine, linear, constant, got 'step'"):
        optim.Schedule(warmup=0, decay="step")
    with pytest.raises(ValueError, match="warmup"):
        optim.Schedule(warmup=-1)


def test_muon_takes_the_blocks_matrices_only() -> None:
    _, parameters = _parameters(0)
    adamw, muon = optim.build_optimizers(parameters, "muon", lr=1e-3, weight_decay=0.1)
    names = {id(p): name for name, p in parameters.items()}
    in_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    in_adamw = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert in_muon == {"blocks.0.weight", "blocks.1.weight"}
    assert in_adamw == {"embed.weight": 0.1, "blocks.0.bias": 0.0, "blocks.1.bias": 0.0}


def test_muon_has_a_rate_in_proportion() -> None:
    _, parameters = _parameters(0)
    adamw, muon = optimizers = optim.build_optimizers(parameters, "muon", lr=1e-3, muon_ratio=3.0)
    for lr in (1e-3, 2e-4):
        optim.set_lr(optimizers, lr)
        assert [group["lr"] for group in adamw.param_groups] == [lr, lr]
        assert [group["lr"] for group in muon.param_groups] == [pytest.approx(3 * lr)]


def test_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        optim.build_optimizers({}, "sgd", lr=1.0)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_round_trip_continues_to_the_bit(name: str) -> None:
    net, parameters = _parameters(0)
    optimizers = optim.build_optimizers(parameters, name, lr=1e-2, weight_decay=0.1)
    _train(net, optimizers, 3)
    weights = {key: p.detach().clone() for key, p in parameters.items()}
    state = {key: t.clone() for key, t in optim.optimizer_tensors(optimizers, parameters).items()}
    _train(net, optimizers, 3)

    other, resumed = _parameters(1)
    other.load_state_dict(weights)
    fresh = optim.build_optimizers(resumed, name, lr=1e-2, weight_decay=0.1)
    optim.load_optimizer_tensors(fresh, resumed, state)
    _train(other, fresh, 3)
    for key, parameter in parameters.items():
        assert torch.equal(parameter, resumed[key])
        assert not torch.equal(parameter, weights[key])


def test_state_of_another_model() -> None:
    _, parameters = _parameters(0)
    with pytest.raises(ValueError, match=r"'head\.weight', which this model lacks"):
        optim.load_optimizer_tensors([], parameters, {"head.weight/exp_avg": torch.zeros(1)})


def test_weight_average() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = optim.WeightAverage({"p": parameter}, decay=0.5)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.set_step(0)
    average.update()
    assert average.tensors["p"].item() == pytest.approx(0.9)  # the decay starts at 1/10
    average.set_step(1000)
    average.update()
    assert average.tensors["p"].item() == pytest.approx(0.95)
    average.load({"p": torch.tensor([3.0])})
    assert average.tensors["p"].item() == 3.0
    with pytest.raises(ValueError, match="ema_decay"):
        optim.WeightAverage({}, decay=1.0)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_rates_that_a_graph_can_hold(name: str) -> None:
    """Tensors that stay where they are, and steps that are those of numbers, to rounding."""
    nets = [_parameters(0) for _ in range(2)]
    both = [
        optim.build_optimizers(parameters, name, lr=1e-2, weight_decay=0.1, muon_ratio=3.0, capturable=capturable)
        for (_, parameters), capturable in zip(nets, (True, False), strict=True)
    ]
    groups = [group for optimizer in both[0] for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for (net, _), optimizers in zip(nets, both, strict=True):
        _train(net, optimizers, 1)
    for key, parameter in nets[0][1].items():
        torch.testing.assert_close(parameter, nets[1][1][key], rtol=1e-5, atol=1e-7)
    before = [parameter.detach().clone() for parameter in nets[0][1].values()]
    optim.set_lr(both[0], 0.0)
    _train(nets[0][0], both[0], 1)
    assert all(map(torch.equal, before, nets[0][1].values()))
    assert all(rate is group["lr"] for rate, group in zip(rates, groups, strict=True))
    assert both[1][0].param_groups[0]["lr"] == 1e-2
