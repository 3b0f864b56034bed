import itertools
import json
import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sora_fast.models.text import ByteTextEncoder, TransformersTextEncoder
from tests.text_encoders import save_clip, save_t5

PROMPTS = ["a seven moving left", "", "eine große Acht", "a three and a two"]


def byte_encoder(dim: int = 8, **options) -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(dim, **options).eval()


def test_bytes_follow_a_start_token():
    ids, layout = byte_encoder().tokenize(["ab", "", "ß"], capacity=9, max_segments=5)
    assert ids.tolist() == [256, 97, 98, 256, 256, 195, 159, 0, 0] and ids.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 7, 7, 7]
    assert layout.grids.tolist() == [[3, 1, 1], [1, 1, 1], [3, 1, 1], [0, 0, 0], [0, 0, 0]]


def test_long_prompts_are_cut_and_too_many_refused():
    encoder = byte_encoder(max_bytes=3)
    assert encoder.tokenize(["abcdef"])[0].tolist() == [256, 97, 98, 99]
    with pytest.raises(ValueError, match="capacity"):
        encoder.tokenize(["abc", "def"], capacity=7)
    with pytest.raises(TypeError, match="prompts: one string, 'abc'"):
        encoder.tokenize("abc")
    with pytest.raises(ValueError, match="kernel_size: 4"):
        ByteTextEncoder(8, kernel_size=4)


@pytest.mark.parametrize(
    ("text", "limit", "kept"),
    [("abcdef", 3, "abc"), ("aß", 2, "a"), ("aß", 3, "aß"), ("球球", 5, "球"), ("球", 2, ""), ("a🎈b", 4, "a")],
)
def test_no_character_is_cut_in_two(text, limit, kept):
    assert byte_encoder(max_bytes=limit).tokenize([text])[0].tolist() == [256, *kept.encode()]


def test_what_is_cut_is_said_once(caplog):
    encoder = byte_encoder(max_bytes=20)
    long, longer = "a red ball rolls down the hill", "eine große Acht, die sehr langsam nach links wandert"
    with caplog.at_level(logging.WARNING):
        encoder.tokenize(["", "a" * 20])
        assert not caplog.messages
        encoder.tokenize(["short", long])
        encoder.tokenize([long, "short"])
        assert caplog.messages == [f"cut to the 20 bytes that the text encoder takes: a text of 30, {long!r}"]
        encoder.check([long, longer, long])
    assert len(longer.encode()) == 53
    assert caplog.messages[1:] == [
        f"cut to the 20 bytes that the text encoder takes: 3 texts, the longest of 53, '{longer[:39]}…'"
    ]


def test_an_endless_stream_of_long_texts_is_no_endless_log(caplog):
    encoder = byte_encoder(max_bytes=3)
    with caplog.at_level(logging.WARNING):
        for number in range(30):
            encoder.tokenize([f"number {number}"])
    assert len(caplog.messages) == 10
    assert caplog.messages[-1].endswith("what is cut from now on is not named any more")
    assert sum("from now on" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("prompt", ["a \udcff ball", "\ud83c"])
def test_what_is_no_text_is_named(prompt):
    with pytest.raises(ValueError, match=r"prompts: .*\\ud.* holds what is no character"):
        byte_encoder().tokenize(["good", prompt])


@pytest.mark.parametrize("spare", [0, 3])
def test_a_text_does_not_depend_on_its_pack(spare):
    encoder = byte_encoder()
    total = encoder.tokenize(PROMPTS)[0].shape[0]
    ids, layout = encoder.tokenize(PROMPTS, capacity=total + spare, max_segments=len(PROMPTS) + spare)
    packed = encoder(ids, layout)
    assert packed.layout is layout and not packed.tokens[total:].any()
    for i, prompt in enumerate(PROMPTS):
        alone = encoder(*encoder.tokenize([prompt]))
        start, end = layout.cu_seqlens[i : i + 2].tolist()
        torch.testing.assert_close(packed.tokens[start:end], alone.tokens)
        torch.testing.assert_close(packed.pooled[i], alone.pooled[0])


def test_a_byte_sees_fourteen_bytes_to_its_right_and_five_more_to_its_left():
    # The convolutions reach 14 bytes to each side, the longest n-gram begins 5 bytes before.
    encoder = byte_encoder()

    def tokens(text: str) -> torch.Tensor:
        return encoder(*encoder.tokenize([text])).tokens[1:]

    plain, changed = tokens("a" * 41), tokens("a" * 20 + "b" + "a" * 20)
    differs = (plain - changed).abs().amax(1) > 1e-6
    assert differs.nonzero().flatten().tolist() == list(range(6, 40))


def test_words_are_learned_quickly():
    """Which digit goes where, from the pooled vector, after a few dozen steps: what a short training run needs."""
    torch.manual_seed(0)
    digits, directions = ["zero", "three", "seven", "nine"], ["up", "down", "left", "right"]
    prompts = [f"a {digit} moving {direction}" for digit in digits for direction in directions]
    digit, direction = torch.arange(16) // 4, torch.arange(16) % 4
    encoder, head = ByteTextEncoder(32), nn.Linear(32, 8)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    packed = encoder.tokenize(prompts)
    for _ in range(40):
        logits = head(encoder(*packed).pooled)
        loss = F.cross_entropy(logits[:, :4], digit) + F.cross_entropy(logits[:, 4:], direction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits[:, :4].argmax(1) == digit).all() and (logits[:, 4:].argmax(1) == direction).all()


def test_one_graph_serves_every_mix_of_prompts():
    encoder = byte_encoder()
    torch.compiler.reset()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompts in (PROMPTS, ["one"], ["", "left"]):
            batch = encoder.tokenize(prompts, capacity=64, max_segments=4)
            torch.testing.assert_close(compiled(*batch).tokens, encoder(*batch).tokens)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_transformers_encoders_give_what_the_library_gives_each_prompt_alone(kind, request):
    import transformers

    folder = request.getfixturevalue(f"{kind}_folder")
    encoder = TransformersTextEncoder(folder)
    total = encoder.tokenize(PROMPTS)[0].shape[0]
    ids, layout = encoder.tokenize(PROMPTS, capacity=total + 5, max_segments=6)
    packed = encoder(ids, layout)
    assert encoder.dim == 16 and packed.tokens.shape == (total + 5, 16) and packed.pooled.shape == (6, 16)
    assert not packed.tokens[total:].any() and not packed.pooled[4:].any()

    library = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel}[kind].from_pretrained(folder)
    for i, prompt in enumerate(PROMPTS):
        inputs = encoder.tokenizer(prompt, truncation=True, max_length=8, return_tensors="pt")
        alone = library(input_ids=inputs["input_ids"])
        start, end = layout.cu_seqlens[i : i + 2].tolist()
        assert ids[start:end].tolist() == inputs["input_ids"][0].tolist()
        torch.testing.assert_close(packed.tokens[start:end], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)
        pooled = alone.pooler_output if kind == "clip" else alone.last_hidden_state.mean(1)
        torch.testing.assert_close(packed.pooled[i], pooled[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "t5", "whole clip"])
def test_the_width_is_known_from_the_configuration_alone(kind, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "whole clip":  # the text encoder's part of its configuration holds what differs from the default only
        transformers.CLIPConfig(text_config={"num_hidden_layers": 2}, projection_dim=24).save_pretrained(tmp_path)
    else:
        folder = request.getfixturevalue(f"{kind}_folder")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").touch()
    assert TransformersTextEncoder.width(tmp_path) == (512 if kind == "whole clip" else 16)


def test_transformers_encoders_are_frozen(t5_folder):
    encoder = TransformersTextEncoder(t5_folder).train()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    batch = encoder.tokenize(PROMPTS)
    first, again = encoder(*batch), encoder(*batch)
    assert torch.equal(first.tokens, again.tokens) and not first.tokens.requires_grad


def test_long_prompts_are_cut_for_the_library(clip_folder, caplog):
    encoder = TransformersTextEncoder(clip_folder)
    with caplog.at_level(logging.WARNING):
        encoder.tokenize(["a " * 6])
        assert not caplog.messages
        ids, layout = encoder.tokenize(["a " * 30])
        encoder.tokenize(["a " * 30])
    # Thirty words, a start and an end.
    assert caplog.messages == [f"cut to the 8 tokens that the text encoder takes: a text of 32, '{'a ' * 19}a…'"]
    assert layout.capacity == 8 and ids[-1] == 1  # CLIP's positions; the end token stays
    assert TransformersTextEncoder(clip_folder, max_tokens=4).tokenize(["a " * 30])[1].capacity == 4


def test_the_fingerprint_is_that_of_what_is_read(clip_folder, tmp_path):
    moved, large = tmp_path / "moved", 40 << 20
    shutil.copytree(clip_folder, moved)
    seen = [TransformersTextEncoder.fingerprint(clip_folder)]
    assert TransformersTextEncoder.fingerprint(moved) == seen[0]
    (moved / "README.md").write_text("nothing that is read")
    assert TransformersTextEncoder.fingerprint(str(moved)) == seen[0]

    weights = load_file(moved / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name][-1, -1] += 1e-3
    tokenizer = (moved / "tokenizer.json").read_text()
    for change in (
        lambda: save_file(weights, moved / "model.safetensors", metadata={"format": "pt"}),
        lambda: (moved / "tokenizer.json").write_text(tokenizer.replace("seven", "eight")),
        lambda: (moved / "model.safetensors").rename(moved / "model-1-of-1.safetensors"),
        lambda: (moved / "model.safetensors").write_bytes(bytes(large)),
        lambda: (moved / "model.safetensors").write_bytes(bytes(large - 1)),
        lambda: (moved / "model.safetensors").write_bytes(bytes(range(256)) * (large // 256)),
    ):
        change()
        seen.append(TransformersTextEncoder.fingerprint(moved))
    assert all(one != other for one, other in itertools.combinations(seen, 2))


def test_pickled_weights_are_refused(clip_folder, tmp_path):
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*.safetensors; pickled weights are not read"):
        TransformersTextEncoder(tmp_path)


def test_missing_weights_are_no_silent_random_ones(t5_folder, tmp_path):
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights encoder\.final_layer_norm\.weight"):
        TransformersTextEncoder(tmp_path)


def test_folders_that_hold_no_text_encoder_are_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        TransformersTextEncoder(tmp_path)
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for read in (TransformersTextEncoder, TransformersTextEncoder.width):
        with pytest.raises(ValueError, match="it holds a 'bert' model"):
            read(tmp_path)
