import pytest
import torch
from torch import nn

from sora_fast.nn import AdaLNSingle, AdaLNZero


def test_tables_are_one_linear_map_of_the_silu() -> None:
    torch.manual_seed(0)
    module, condition = AdaLNZero(8, 3), torch.randn(5, 8)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    tables = module(condition)
    assert len(tables) == 3
    activated = condition / (1 + torch.exp(-condition))
    for index, table in enumerate(tables):
        part = slice(8 * index, 8 * index + 8)
        torch.testing.assert_close(table, activated @ module[1].weight[part].T + module[1].bias[part])
        assert table.is_contiguous()


def test_starts_at_zero() -> None:
    assert not any(table.any() for table in AdaLNZero(8, 2)(torch.randn(5, 8)))


def test_single_is_pixart_s_formula() -> None:
    torch.manual_seed(0)
    module, t_block = AdaLNSingle(8, 6), nn.Sequential(nn.SiLU(), nn.Linear(8, 48))
    shared = t_block(torch.randn(5, 8))
    # PixArtMSBlock.forward, where a batch entry is a row.
    expected = (module.scale_shift_table[None] + shared.reshape(5, 6, -1)).chunk(6, dim=1)
    tables = module(shared)
    assert len(tables) == 6 and all(table.is_contiguous() for table in tables)
    assert all(torch.equal(table, part[:, 0]) for table, part in zip(tables, expected, strict=True))


def test_single_s_final_layer_takes_the_condition_itself() -> None:
    module, condition = AdaLNSingle(8, 2), torch.randn(5, 8)
    # T2IFinalLayer.forward.
    expected = (module.scale_shift_table[None] + condition[:, None]).chunk(2, dim=1)
    assert all(torch.equal(table, part[:, 0]) for table, part in zip(module(condition), expected, strict=True))


def test_single_starts_small_and_takes_gradients() -> None:
    torch.manual_seed(0)
    module, shared = AdaLNSingle(4096, 6), torch.zeros(3, 6 * 4096, requires_grad=True)
    assert module.scale_shift_table.std().item() == pytest.approx(4096**-0.5, rel=0.05)
    sum(table.sum() for table in module(shared)).backward()
    assert (shared.grad == 1).all() and (module.scale_shift_table.grad == 3).all()


def test_bad_shared_modulation_is_named() -> None:
    with pytest.raises(ValueError, match=r"shared: shape \(5, 40\); it must be \[M, 48\] or \[M, 8\]"):
        AdaLNSingle(8, 6)(torch.zeros(5, 40))
