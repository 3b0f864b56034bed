import torch

from sora_fast.nn import AdaLNZero


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
