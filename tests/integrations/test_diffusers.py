"""Replacements on models of diffusers: what they say, what they leave alone, and how they come off."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers.models.transformers import transformer_wan as theirs

from sora_fast.integrations.diffusers import applied, apply, revert, wan
from tests.wan import arguments, step
from tests.wan import wan as tiny

_NAMES = [f"blocks.{block}{part}" for block in (0, 1) for part in ("", ".attn1", ".attn2")]


def content(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """All that every module holds, in order, by identity; of its own dictionaries what is in them."""

    def of(value: Any) -> Any:
        return [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else id(value)

    return {name: [(key, of(value)) for key, value in vars(part).items()] for name, part in model.named_modules()}


def test_the_report_names_every_module_and_what_runs_there() -> None:
    model = tiny()
    with applied(model) as report:
        assert [module.name for module in report.replaced] == _NAMES
        assert report.modules[0].kind == "WanTransformerBlock"
        assert [op.split(": ")[0] for op in report.modules[0].ops] == list(wan.BLOCK.ops)
        assert report.modules[0].ops[0] == "adaln: torch"
        assert "blocks.1.attn2 (WanAttention): replaced by qk_norm_rope: torch, packed_attention: " in str(report)


def test_nothing_is_left_after_revert() -> None:
    model = tiny()
    inputs = arguments(model)
    before = {name: x.clone() for name, x in step(model, inputs).items()}
    model.zero_grad()
    held, names, state = content(model), list(model.state_dict()), torch.get_rng_state()
    with applied(model):
        assert list(model.state_dict()) == names
        assert content(model) != held
    assert content(model) == held
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in step(model, inputs).items())


def test_one_of_two_models() -> None:
    one, other = tiny(), tiny()
    held, inputs = content(other), arguments(one)
    wanted = step(other, inputs)["output"]
    with applied(one):
        assert content(other) == held
        assert torch.equal(step(other, inputs)["output"], wanted)
        assert not torch.equal(step(one, inputs)["output"], wanted), "nothing was replaced"


def test_a_deep_copy_is_replaced_by_itself() -> None:
    model = tiny()
    apply(model, check=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].scale_shift_table.add_(1)
    inputs = arguments(model)
    assert not torch.equal(step(model, inputs)["output"], step(twin, inputs)["output"])
    revert(twin)
    revert(model)
    assert "forward" not in vars(twin.blocks[0])
    assert isinstance(twin.blocks[0].attn1.processor, theirs.WanAttnProcessor)


def test_another_source_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Processor(theirs.WanAttnProcessor):
        def __call__(self, attn: nn.Module, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
            return super().__call__(attn, hidden_states, *rest) * 2

    forward = theirs.WanTransformerBlock.forward
    monkeypatch.setattr(theirs.WanTransformerBlock, "forward", lambda self, *args: forward(self, *args) * 2)
    model = tiny()
    model.blocks[1].attn1.set_processor(Processor())
    held = content(model)
    with applied(model) as report:
        assert [module.name for module in report.kept] == ["blocks.0", "blocks.1", "blocks.1.attn1"]
        assert all("source is not what the replacement was written for" in module.reason for module in report.kept)
        assert content(model)["blocks.1.attn1"] == held["blocks.1.attn1"]
    assert "3 of 6 known modules are not replaced: blocks.0" in caplog.text


def test_a_module_that_fails_its_check_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = wan.gated_residual
    monkeypatch.setattr(wan, "gated_residual", lambda x, branch, gate, rows: right(x, branch * 1.0001, gate, rows))
    with applied(tiny()) as report:
        assert [module.name for module in report.kept] == ["blocks.0", "blocks.1"]
        assert "the check failed: the " in report.kept[0].reason


def test_self_and_cross_attention_are_checked_each(monkeypatch: pytest.MonkeyPatch) -> None:
    right = wan._self_attention
    monkeypatch.setattr(wan, "_self_attention", lambda *args: right(*args) * 1.001)
    with applied(tiny()) as report:
        assert [module.name for module in report.kept] == ["blocks.0.attn1", "blocks.1.attn1"]


def test_a_module_that_cannot_be_checked_is_left_alone() -> None:
    model = tiny().to("meta")
    with applied(model) as report:
        assert not report.replaced
        assert "the check could not run it" in report.kept[0].reason


def test_hooks_run_and_those_that_would_not_keep_their_module_as_it_is() -> None:
    model, called = tiny(), []
    model.blocks[0].attn1.register_forward_hook(lambda *_: called.append("attn1"))
    model.blocks[0].ffn.register_forward_pre_hook(lambda *_: called.append("ffn"))
    model.blocks[1].norm3.register_forward_hook(lambda *_: called.append("norm3"))
    with applied(model) as report:
        assert called == [], "the check runs no hooks"
        assert [module.name for module in report.kept] == ["blocks.1"]
        assert "norm3 has hooks" in report.kept[0].reason
        model(**arguments(model))
    assert called == ["attn1", "ffn", "norm3"]


def test_a_forward_that_is_bound_already_stays_and_one_bound_since_must_go_first() -> None:
    model = tiny()
    block = model.blocks[0]
    block.forward = original = block.forward
    with applied(model, check=False) as report:
        assert [module.name for module in report.kept] == ["blocks.0"]
        assert block.forward is original
        ours, model.blocks[1].forward = model.blocks[1].forward, lambda *args: None
        with pytest.raises(ValueError, match=r"the forward of blocks\.1 has been set since"):
            revert(model)
        model.blocks[1].forward = ours


def test_what_cannot_be_applied_to_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="Linear holds nothing that can be replaced"):
        apply(nn.Linear(2, 2))
    with applied(model, check=False), pytest.raises(ValueError, match="replaced already"):
        apply(model)
    with pytest.raises(ValueError, match="is compiled; apply first"):
        apply(torch.compile(model))


class _LoRA(nn.Module):
    """What peft makes of a Linear, in short."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_lora_checkpointing_and_compile_together() -> None:
    model = tiny()
    for block in model.blocks:
        for attn in (block.attn1, block.attn2):
            attn.to_q, attn.to_out[0] = _LoRA(attn.to_q), _LoRA(attn.to_out[0])
    inputs = arguments(model)
    wanted = {name: x.clone() for name, x in step(model, inputs).items()}
    model.enable_gradient_checkpointing()
    with applied(model) as report:
        assert not report.kept, report
        eager = {name: x.clone() for name, x in step(model, inputs).items()}
        model.blocks[0].compile(fullgraph=True, backend="aot_eager")  # one: the other would take as long again
        compiled = step(model, inputs)
    for results in (eager, compiled):
        torch.testing.assert_close(results, wanted, atol=1e-5, rtol=1e-4)


def test_lora_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ffn.net.2"], init_lora_weights=False))
    inputs, names = arguments(model), list(model.state_dict())
    wanted = {name: x.clone() for name, x in step(model, inputs).items()}
    with applied(model) as report:
        assert not report.kept, report
        assert list(model.state_dict()) == names
        torch.testing.assert_close(step(model, inputs), wanted, atol=1e-5, rtol=1e-4)


def test_training_after_sampling_in_inference_mode() -> None:
    model = tiny()
    inputs = arguments(model)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :1]  # a size that no other test has made a layout for
    with applied(model, check=False):
        with torch.inference_mode():
            model(**inputs)
        assert step(model, inputs)["blocks.0.attn1.to_q.weight"].isfinite().all()
