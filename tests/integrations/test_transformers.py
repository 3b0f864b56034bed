"""`attn_implementation="sora_fast"` beside transformers' own, on a tiny Llama and a tiny encoder."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sora_fast.integrations.transformers import attention, register

transformers = pytest.importorskip("transformers", minversion="4.56", reason="transformers is not installed")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def models(kind: str = "Llama", **options: Any) -> Iterator[Any]:
    """The same weights, attending by transformers' own kernel and by ours."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    theirs = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="sdpa").double()
    ours = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="sora_fast").double()
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def outputs(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs, use_cache=False).last_hidden_state


TOKENS = torch.arange(36).reshape(3, 12) % 40


def test_whole_rows_and_their_gradients() -> None:
    theirs, ours = models()
    assert ours.config._attn_implementation == "sora_fast"
    results = []
    for model in (theirs, ours):
        out = outputs(model, input_ids=TOKENS)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_attended(side: str) -> None:
    theirs, ours = models()
    mask = torch.arange(12) < torch.tensor([12, 5, 1])[:, None]
    mask = mask if side == "right" else mask.flip(1)
    expected, found = (outputs(model, input_ids=TOKENS, attention_mask=mask.long()) for model in (theirs, ours))
    torch.testing.assert_close(found[mask], expected[mask])


@pytest.mark.parametrize("window", [None, 4])
def test_a_packed_row_equals_its_sequences(window: int | None) -> None:
    options = {} if window is None else {"sliding_window": window}
    theirs, ours = models("Llama" if window is None else "Mistral", **options)
    rows = [{"input_ids": TOKENS[0, :7].tolist()}, {"input_ids": TOKENS[1, :4].tolist()}]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collate(rows)
    packed.pop("labels")
    found = outputs(ours, **packed)[0]
    expected = [outputs(theirs, input_ids=torch.tensor([row["input_ids"]]))[0] for row in rows]
    torch.testing.assert_close(found, torch.cat(expected))


def test_a_packed_row_without_bounds_is_refused() -> None:
    _, ours = models()
    packed = transformers.DataCollatorWithFlattening()([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    packed.pop("labels")
    with pytest.raises(ValueError, match=r"position_ids: they start again .*return_flash_attn_kwargs=True"):
        outputs(ours, **packed)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_after_a_cache(padded: bool) -> None:
    theirs, ours = models()
    mask = torch.ones(3, 12, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    expected = outputs(theirs, input_ids=TOKENS, attention_mask=mask)
    first = ours(input_ids=TOKENS[:, :8], attention_mask=mask[:, :8], use_cache=True)
    cache = {"past_key_values": first.past_key_values, "use_cache": True}
    then = ours(input_ids=TOKENS[:, 8:], attention_mask=mask, **cache).last_hidden_state
    torch.testing.assert_close(then, expected[:, 8:])


def test_an_encoder_sees_both_sides() -> None:
    theirs, ours = models("Bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    mask = torch.arange(12) < torch.tensor([12, 5, 1])[:, None]
    expected, found = (model(input_ids=TOKENS, attention_mask=mask.long())[0] for model in (theirs, ours))
    torch.testing.assert_close(found[mask], expected[mask])


X = torch.randn(2, 2, 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout: 0.1; there is none here"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask: 4 dimensions"),
        ({"output_attentions": True}, "output_attentions: True"),
        ({"softcap": 30.0}, "softcap: given, but not done here"),
        ({"position_bias": torch.zeros(1)}, "position_bias: given"),
        ({"attention_mask": torch.ones(2, 4), "sliding_window": 2}, "sliding_window: 2 tokens with a padded batch"),
    ],
)
def test_what_would_change_the_result_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(torch.nn.Module(), X, X, X, **{"attention_mask": None, **options})
