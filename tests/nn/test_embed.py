import math

import pytest
import torch

from sora_fast.nn import LabelEmbedder, TimestepEmbedder


def test_timesteps_are_dit_s_sinusoids_through_the_mlp() -> None:
    torch.manual_seed(0)
    module, steps = TimestepEmbedder(16), [0.0, 1.0, 37.5, 999.0]
    frequencies = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
    features = torch.tensor([[f(t * w) for f in (math.cos, math.sin) for w in frequencies] for t in steps])
    hidden = features @ module.mlp[0].weight.T + module.mlp[0].bias
    expected = (hidden * torch.sigmoid(hidden)) @ module.mlp[2].weight.T + module.mlp[2].bias
    torch.testing.assert_close(module(torch.tensor(steps)), expected, rtol=1e-4, atol=1e-4)


def test_angles_are_exact_where_the_weights_are_not() -> None:
    """In bfloat16 the steps 999 and 1000 would be one."""
    module, seen = TimestepEmbedder(16).bfloat16(), []
    module.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    assert module(torch.tensor([999.0])).dtype == torch.bfloat16
    assert seen[0][0, 0].item() == pytest.approx(math.cos(999), abs=4e-3)


def test_labels_pick_rows_and_the_last_row_is_none() -> None:
    torch.manual_seed(0)
    module = LabelEmbedder(8, 10)
    rows = module(torch.tensor([3, 10, 0]))
    assert module.embedding_table.weight.shape == (11, 8)
    assert torch.equal(rows, module.embedding_table.weight[[3, 10, 0]])
    with pytest.raises(IndexError):
        module(torch.tensor([11]))
