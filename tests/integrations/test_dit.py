import argparse
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_fast.integrations import dit
from sora_fast.models import SoraDiT
from tests.diffusion.published import sample_chain
from tests.helpers import assert_within_rule
from tests.plain_dit import grid_positions, plain_dit

# Depth, width and heads (Peebles & Xie 2023, Table 1), and a grid of 4 × 4 patches for the fixed positions.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
GRID = 4
SLOW = {"L", "XL"}


def shapes_of(
    size: str, patch: int, *, channels: int = 4, classes: int = 1000, learned_sigma: bool = True
) -> dict[str, tuple[int, ...]]:
    """What stands in a checkpoint of DiT."""
    depth, c, _ = SIZES[size]
    matrices = {"t_embedder.mlp.0": (c, 256), "t_embedder.mlp.2": (c, c)}
    for block in (f"blocks.{index}" for index in range(depth)):
        matrices[f"{block}.attn.qkv"] = (3 * c, c)
        matrices[f"{block}.attn.proj"] = (c, c)
        matrices[f"{block}.mlp.fc1"] = (4 * c, c)
        matrices[f"{block}.mlp.fc2"] = (c, 4 * c)
        matrices[f"{block}.adaLN_modulation.1"] = (6 * c, c)
    matrices["final_layer.linear"] = (patch * patch * channels * (1 + learned_sigma), c)
    matrices["final_layer.adaLN_modulation.1"] = (2 * c, c)
    matrices["x_embedder.proj"] = (c, channels, patch, patch)
    shapes = {"pos_embed": (1, GRID * GRID, c), "y_embedder.embedding_table.weight": (classes + 1, c)}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def checkpoint(size: str, patch: int, *, seed: int = 0, **options: int | bool) -> dict[str, Tensor]:
    """Random weights of a scale at which every layer shows in the output, and the next does not drown it.

    They are windows, each at a place of its own, into one line of numbers for every scale, which a file holds once: to
    draw all of XL's, write and read them was two thirds of its test.
    """
    generator, shapes = torch.Generator().manual_seed(seed), shapes_of(size, patch, **options)
    scales, longest = {}, defaultdict(int)
    for name, shape in shapes.items():
        fan_in = 9 if len(shape) == 1 else math.prod(shape[1:])
        scales[name] = 1 if name.startswith("y_embedder") else fan_in**-0.5
        longest[scales[name]] = max(longest[scales[name]], math.prod(shape))
    places = 100_003
    lines = {scale: torch.empty(n + places).normal_(std=scale, generator=generator) for scale, n in longest.items()}
    state = {}
    for name, shape in shapes.items():
        start = int(torch.randint(places, (), generator=generator))
        state[name] = lines[scales[name]][start : start + math.prod(shape)].view(shape)
    return {**state, "pos_embed": grid_positions(SIZES[size][1], GRID, GRID)[None]}


def hollow(size: str = "S", patch: int = 2, **options: int | bool) -> dict[str, Tensor]:
    """Zeros that take no space, in a file neither."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes_of(size, patch, **options).items()}


def loaded(content: object, path: Path) -> SoraDiT:
    torch.save(content, path)
    return dit.load(path)


def write(state: dict[str, Tensor], path: Path) -> None:
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    # Of a memory of its own each: safetensors writes no other.
    return {name: tensor.clone() for name, tensor in checkpoint("S", 8, classes=10).items()}


SETTINGS = [
    pytest.param(size, patch, marks=[pytest.mark.slow] if size in SLOW else [], id=f"{size}/{patch}")
    for size, patch in itertools.product(SIZES, (2, 4, 8))
]


@pytest.mark.parametrize(("size", "patch"), SETTINGS)
@torch.no_grad()
def test_a_pack_of_images_gives_what_dit_gives_each(size: str, patch: int, tmp_path: Path) -> None:
    state = checkpoint(size, patch)
    torch.manual_seed(1)
    images = [torch.randn(4, 1, rows * patch, columns * patch) for rows, columns in [(GRID, GRID), (2, 6), (4, 2)]]
    t, labels = torch.tensor([999, 0, 417]), torch.tensor([3, 1000, 999])
    inputs = list(zip(images, t.tolist(), labels.tolist(), strict=True))
    expected = [plain_dit(state, image[:, 0], time, label, heads=SIZES[size][2]) for image, time, label in inputs]
    path = tmp_path / "dit.pt"
    torch.save(state, path)
    model = dit.load(path)
    path.unlink()  # what a test leaves behind is kept for a while
    assert model.config == dit.config(size, patch)
    for made, wanted in zip(dit.forward(model, images, t, labels), expected, strict=True):
        assert made.shape == (8, 1, *wanted.shape[1:])
        assert (made[:, 0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize(("channels", "classes"), [(4, 1000), (16, 7)])
def test_the_shapes_tell_the_configuration(
    patch: int, learned_sigma: bool, channels: int, classes: int, tmp_path: Path
) -> None:
    state = hollow("S", patch, channels=channels, classes=classes, learned_sigma=learned_sigma)
    state["pos_embed"] = grid_positions(384, GRID, GRID)[None]
    found = loaded(state, tmp_path / "dit.pt").config
    assert found == dit.config("S", patch, in_channels=channels, num_classes=classes, learned_sigma=learned_sigma)


def test_a_new_model_can_be_a_dit() -> None:
    found = dit.config("XL", 2)
    assert (found.depth, found.dim, found.heads) == (28, 1152, 16)
    assert (found.patch_size, found.in_channels, found.num_classes) == ((1, 2, 2), 4, 1000)
    assert found.learned_sigma and found.discrete_time and not found.qk_norm and found.position == "sincos"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("before, after", [(".pt", ".safetensors"), (".safetensors", ".pth")])
def test_a_checkpoint_comes_back_bit_for_bit(
    small: dict[str, Tensor], dtype: torch.dtype, before: str, after: str, tmp_path: Path
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small.items()}
    # numpy's sines and torch's may differ in the last bit: the file's own come back.
    state["pos_embed"][0, 5, 7] = torch.nextafter(state["pos_embed"][0, 5, 7], torch.ones((), dtype=dtype))
    first, second = tmp_path / f"first{before}", tmp_path / f"second{after}"
    write(state, first)
    model = dit.load(first)
    first.write_bytes(b"")
    dit.save(model, second)
    assert_same_bits(read(second), state)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_new_model_is_saved_with_the_positions_of_the_grid_asked_for(tmp_path: Path) -> None:
    model = SoraDiT(dit.config("S", 8, num_classes=3))
    with pytest.raises(ValueError, match="grid: None"):
        dit.save(model, tmp_path / "dit.pt")
    dit.save(model, tmp_path / "dit.pt", grid=3)
    saved = torch.load(tmp_path / "dit.pt", weights_only=True)
    torch.testing.assert_close(saved["pos_embed"], grid_positions(384, 3, 3)[None], rtol=0, atol=1e-7)
    again = dit.load(tmp_path / "dit.pt")
    assert again.config == model.config
    assert_same_bits(again.state_dict(), model.state_dict())


def test_averaged_weights_are_taken_first_and_a_training_checkpoint_is_read(
    small: dict[str, Tensor], tmp_path: Path
) -> None:
    other = {**small, "x_embedder.proj.bias": torch.zeros(384)}
    training = {"model": other, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/8", epochs=1400)}
    for content, wanted in [({**training, "ema": small}, small), (training, other), (small, small)]:
        bias = loaded(content, tmp_path / "dit.pt").x_embedder.proj.bias
        assert torch.equal(bias, wanted["x_embedder.proj.bias"])
    torch.save({**training, "ema": small}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(dit.load(tmp_path / "old.pt").x_embedder.proj.bias, small["x_embedder.proj.bias"])


WRAPPED = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("inside", ["", "ema", "model"])
@pytest.mark.parametrize("prefix", WRAPPED)
def test_names_of_compiled_and_data_parallel_models_are_read(prefix: str, inside: str, tmp_path: Path) -> None:
    bias = torch.arange(512.0)
    state = {**hollow("S", 8), "pos_embed": grid_positions(384, GRID, GRID)[None], "final_layer.linear.bias": bias}
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    model = loaded({inside: wrapped} if inside else wrapped, tmp_path / "dit.pt")
    assert model.config == dit.config("S", 8) and torch.equal(model.final_layer.linear.bias, bias)


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, torch.nn.DataParallel, lambda module: torch.compile(torch.nn.DataParallel(module))],
    ids=["compiled", "data-parallel", "both"],
)
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_the_wrappers_of_torch_themselves(small: dict[str, Tensor], wrap: Callable, part: str, tmp_path: Path) -> None:
    """Around the model, and around each block, which puts the word into the middle of a name."""
    model = loaded(small, tmp_path / "dit.pt")
    if part == "blocks":
        model.blocks = torch.nn.ModuleList(map(wrap, model.blocks))
    state = model.state_dict() if part == "blocks" else wrap(model).state_dict()
    assert any({"_orig_mod", "module"} & set(name.split(".")) for name in state)
    (kernel,) = (name for name in state if name.endswith("x_embedder.proj.weight"))
    state[kernel] = small["x_embedder.proj.weight"]
    state[kernel.replace("x_embedder.proj.weight", "pos_embed")] = small["pos_embed"]
    again = loaded(state, tmp_path / "wrapped.pt")
    assert_same_bits(again.state_dict(), loaded(small, tmp_path / "dit.pt").state_dict())


@pytest.mark.parametrize("name", ["A.SAFETENSORS", "A.PT", os.fsdecode(b"\xe9.pt"), os.fsdecode(b"\xe9.safetensors")])
def test_capitals_and_names_that_are_no_utf8(small: dict[str, Tensor], name: str, tmp_path: Path) -> None:
    model = loaded(small, tmp_path / "dit.pt")
    dit.save(model, tmp_path / name)
    assert_same_bits(dit.load(tmp_path / name).state_dict(), model.state_dict())
    assert (tmp_path / name).read_bytes().startswith(b"PK") == name.lower().endswith(".pt")


def test_two_models_under_one_name_are_not_mixed(small: dict[str, Tensor], tmp_path: Path) -> None:
    both = {**small, "module.pos_embed": small["pos_embed"]}
    with pytest.raises(ValueError, match=r"holds pos_embed twice, once as module\.pos_embed"):
        loaded(both, tmp_path / "dit.pt")


@pytest.mark.parametrize(
    ("rows", "told", "asked", "classes", "null"),
    [
        (1001, None, None, 1000, True),
        (1000, None, None, 1000, False),
        (1000, None, 999, 999, True),
        (1001, None, 1001, 1001, False),
        (11, None, None, 10, True),
        (11, None, 11, 11, False),
        (10, 10, None, 10, False),
        (10, 9, None, 9, True),
        (1000, 999, None, 999, True),
        (10, 1000, None, 9, True),
        (10, 10, 9, 9, True),
    ],
)
def test_how_many_classes_there_are_and_whether_one_is_none(
    rows: int, told: int | None, asked: int | None, classes: int, null: bool, tmp_path: Path
) -> None:
    content = {"ema": hollow(classes=rows - 1)}
    content["ema"]["pos_embed"] = grid_positions(384, GRID, GRID)[None]
    if told is not None:
        content["args"] = argparse.Namespace(num_classes=told)
    torch.save(content, tmp_path / "dit.pt")
    found = dit.load(tmp_path / "dit.pt", num_classes=asked).config
    assert found == dit.config("S", 2, num_classes=classes, null_class=null)


def test_classes_that_the_table_cannot_have_are_named(tmp_path: Path) -> None:
    torch.save(hollow(), tmp_path / "dit.pt")
    with pytest.raises(
        ValueError, match="num_classes: 10; the table of labels has 1001 rows, so it must be 1001, or 1000"
    ):
        dit.load(tmp_path / "dit.pt", num_classes=10)


@torch.no_grad()
def test_a_table_without_no_class_lends_its_last_class_to_nobody(tmp_path: Path) -> None:
    model = SoraDiT(dit.config("S", 8, num_classes=1000, null_class=False))
    dit.save(model, tmp_path / "dit.pt", grid=4)
    model = dit.load(tmp_path / "dit.pt")
    assert model.y_embedder.embedding_table.weight.shape[0] == 1000
    noise, labels = [torch.zeros(4, 1, 8, 8)], torch.tensor([999])
    for guidance in (4.0, 0.0, torch.tensor([4.0])):
        with pytest.raises(ValueError, match=r"guidance: .*it must be 1, .* 1000 rows for 1000 classes"):
            dit.sample(model, noise, labels, steps=1, guidance=guidance)
    assert dit.sample(model, noise, labels, steps=1)[0].shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"labels: \[1000\]; each must lie in 0 … 999"):
        dit.sample(model, noise, torch.tensor([1000]), steps=1)


def test_averaged_positions_are_taken_for_what_they_are(small: dict[str, Tensor], tmp_path: Path) -> None:
    """DiT's train.py averages the fixed table too: every step rounds."""
    table = small["pos_embed"]
    averaged = table.clone()
    for _ in range(3000):
        averaged.mul_(0.9999).add_(table, alpha=1 - 0.9999)
    assert 1e-5 < (averaged - table).abs().max() < 1e-3
    model = loaded({"ema": {**small, "pos_embed": averaged}}, tmp_path / "dit.pt")
    dit.save(model, tmp_path / "again.pt")
    assert torch.equal(torch.load(tmp_path / "again.pt")["pos_embed"], averaged)


class Trap:
    """What would be called, if anything in a file could be."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.place,)

    def __init__(self, place: str) -> None:
        self.place = place


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"ema": hollow(), "args": Trap(str(tmp_path / "sprung"))}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="is not made of tensors and plain values alone"):
        dit.load(tmp_path / "dit.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks.3.attn.qkv.bias": None}, r"blocks\.3\.attn\.qkv\.bias is missing$"),
        ({"x_embedder.proj.weight": None}, r"x_embedder\.proj\.weight is missing$"),
        ({"pos_embed": None}, "pos_embed is missing$"),
        ({"blocks.0.attn.q_norm": (64,)}, r"blocks\.0\.attn\.q_norm is unknown$"),
        ({"blocks.12.attn.qkv.bias": (1152,)}, r"blocks\.12\.attn\.qkv\.bias is unknown$"),
        ({"blocks.1.mlp.fc1.weight": (9, 384)}, r"fc1\.weight has the shape \(9, 384\); it must be \(1536, 384\)$"),
        ({"final_layer.linear.weight": (7, 384)}, r"linear\.weight has the shape \(7, 384\); it must be \(16, 384\)"),
        ({"x_embedder.proj.weight": (384, 16)}, r"proj\.weight has the shape \(384, 16\); it must have 4 dimensions"),
        ({"x_embedder.proj.weight": (384, 4, 2, 3)}, r"\(384, 4, 2, 3\); it must be \(384, 4, 2, 2\)$"),
        ({"x_embedder.proj.weight": (400, 4, 2, 2)}, "a width of 384, 768, 1024, 1152"),
        ({"pos_embed": (1, 15, 384)}, r"pos_embed has the shape \(1, 15, 384\); it must be \(1, 9, 384\)"),
        ({"pos_embed": (1, 0, 384)}, r"pos_embed has the shape \(1, 0, 384\)"),
        ({"pos_embed": (1, 16, 384)}, "pos_embed: it differs by 1 from DiT's"),
        ({f"extra.{i}": (1,) for i in range(20)}, r"extra\.7 is unknown; and 12 more$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_entries_are_named(changed: dict[str, tuple | None], message: str, tmp_path: Path) -> None:
    state = hollow()
    for name, shape in changed.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(()).expand(shape)
    with pytest.raises(ValueError, match=message):
        loaded(state, tmp_path / "dit.pt")


def test_other_wrong_files_are_named(tmp_path: Path) -> None:
    mixed = {**hollow(), "t_embedder.mlp.0.bias": torch.zeros(384, dtype=torch.float16)}
    integers = {name: tensor.int() for name, tensor in hollow().items()}
    for content, message in [
        (mixed, r"t_embedder\.mlp\.0\.bias is torch\.float16"),
        (integers, r"is torch\.int32"),
        ([1, 2], "holds a list"),
        ({"step": 3}, "step is no tensor"),
        ({"ema": {"step": 3}}, "step is no tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            loaded(content, tmp_path / "dit.pt")
    for name, content in {
        "a.pt": b"",
        "b.pt": b"junk",
        "c.safetensors": b"junk",
        "d.pt": b"PK\x03\x04 and no more",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"path: .*{name}"):
            dit.load(tmp_path / name)
    torch.save(hollow(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for size in range(0, len(whole), len(whole) // 20):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"path: .*cut\.pt"):
            dit.load(tmp_path / "cut.pt")
    for name in ("none.pt", "none.safetensors", ""):
        with pytest.raises(FileNotFoundError, match=f"path: .*{name} is no file"):
            dit.load(tmp_path / name)
    nan = {**hollow(), "pos_embed": torch.full((1, 16, 384), float("nan"))}
    with pytest.raises(ValueError, match="pos_embed: it differs by nan"):
        loaded(nan, tmp_path / "dit.pt")


def test_only_a_dit_is_saved_and_a_failure_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    for model, message in [
        (tiny(qk_norm=True, position="rope"), "having qk_norm = True, position = 'rope'"),
        (tiny(patch_size=(2, 2, 2), num_classes=None), r"having patch_size = \(2, 2, 2\), num_classes = None"),
        (tiny(), "depth, width and heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            dit.save(model, path, grid=4)
    with pytest.raises(ValueError, match=r"path: .*ends in '\.bin'"):
        dit.save(tiny(), tmp_path / "dit.bin", grid=4)

    def half(state: object, place: Path) -> None:
        place.write_text("half")
        raise OSError("the disk is full")

    model = SoraDiT(dit.config("S", 8, num_classes=3))
    path.write_text("old")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="full"):
        dit.save(model, path, grid=4)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def tiny(**options: object) -> SoraDiT:
    """A DiT too small to be one of the published, with every weight random."""
    torch.manual_seed(0)
    base = dit.config("S", 2, num_classes=7)
    model = SoraDiT(replace(base, **{"dim": 32, "depth": 2, "heads": 2, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def plain_weights(model: SoraDiT) -> dict[str, Tensor]:
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    _, side, _ = model.config.patch_size
    kernel = weights["x_embedder.proj.weight"]
    return {**weights, "x_embedder.proj.weight": kernel.unflatten(1, (-1, side, side))}


SAMPLED = [(8, 8), (4, 12), (6, 4)]
CLASSES = [3, 0, 6]
STEPS = 9


def starts(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 1, *size, generator=generator, dtype=torch.float64).to(dtype) for size in SAMPLED]


def noise_of(seed: int, like: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """What a generator of `dtype` draws for an image, step after step, in the dtype of `like`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(like.numel(), generator=generator, dtype=dtype).view(like.shape).to(like.dtype)


def reference_samples(
    model: SoraDiT, compute: torch.dtype, chain: torch.dtype, *, drawn: torch.dtype, guidance: float, channels: int
) -> Tensor:
    """DiT's sample.py for each image alone, its guidance as in `forward_with_cfg`; all images, flattened.

    compute: the dtype of the model; chain: of the sampler; drawn: of the random numbers.
    """
    weights = {name: tensor.to(compute) for name, tensor in plain_weights(model).items()}
    samples = []
    for index, start in enumerate(starts(drawn)):

        def predict(x: Tensor, timestep: int, label: int = CLASSES[index]) -> Tensor:
            given, none = (
                plain_dit(weights, x.to(compute), timestep, which, heads=2).to(chain) for which in (label, 7)
            )
            guided = none[:channels] + guidance * (given[:channels] - none[:channels])
            # What is not guided, the variance among it, is that of the label.
            return torch.cat([guided, given[channels:]])

        image = start[:, 0].to(chain)
        noise = noise_of(index, image, drawn)
        learned = model.config.learned_sigma
        samples.append(sample_chain(predict, image, noise, steps=STEPS, learned_variance=learned).flatten())
    return torch.cat(samples)


@pytest.mark.parametrize(
    ("guidance", "channels", "learned_sigma"),
    [(1.0, 3, True), (4.0, 3, True), (4.0, None, True), (4.0, 3, False)],
    ids=["plain", "first three", "all", "fixed variance"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_samples_are_those_of_dit(
    guidance: float, channels: int | None, learned_sigma: bool, dtype: torch.dtype
) -> None:
    model = tiny(learned_sigma=learned_sigma).to(dtype)
    chain = torch.promote_types(dtype, torch.float32)
    generators = [torch.Generator().manual_seed(index) for index in range(len(SAMPLED))]
    options = {"steps": STEPS, "guidance": guidance, "channels": channels, "generator": generators}
    made = dit.sample(model, starts(chain), torch.tensor(CLASSES), **options)
    assert [image.shape for image in made] == [(4, 1, *size) for size in SAMPLED]
    made = torch.cat([image.flatten() for image in made])
    options = {"drawn": chain, "guidance": guidance, "channels": channels or 4}
    oracle = reference_samples(model, torch.float64, torch.float64, **options)
    if dtype == torch.float64:
        assert (made - oracle).abs().max() <= 1e-12 * oracle.abs().max()
    else:
        assert_within_rule(made, reference_samples(model, dtype, chain, **options), oracle)


@pytest.mark.parametrize("channels", [1, 3, 9, None])
def test_guidance_of_all_channels_leaves_the_variance_alone(channels: int | None) -> None:
    """One channel of noise, and one of the variance's share: however many are asked for, the same one is guided."""
    model, noise = tiny(in_channels=1), [torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))]
    results = [
        dit.sample(model, noise, torch.tensor([1]), steps=2, guidance=4.0, channels=count, generator=seeded())
        for count in (1, channels)
    ]
    assert torch.equal(*(result[0] for result in results))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_all_timesteps_reach_the_model_as_they_are() -> None:
    """DiT's t and this package's sigma are one thing, through fp32 and back, for each of the 1000."""
    seen = []
    model = tiny()
    model.t_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.zeros(4, 1, 2, 2)
    with torch.no_grad():
        dit.forward(model, [image] * 1000, torch.arange(1000), torch.zeros(1000, dtype=torch.int64))
    assert torch.equal(seen[0], torch.arange(1000.0))


def test_bad_calls_are_named() -> None:
    images, t, labels = starts(torch.float32), torch.tensor([1, 2, 3]), torch.tensor(CLASSES)

    def call(model: SoraDiT | None = None, images: list[Tensor] = images, t: Tensor = t, labels: Tensor = labels):
        dit.forward(model or tiny(), images, t, labels)

    for arguments, message in [
        ({"model": tiny(num_classes=None)}, "model: it is no DiT, having num_classes = None"),
        ({"images": []}, "images: none"),
        ({"images": [*images[:2], torch.zeros(4, 2, 2)]}, r"images: number 2 has the shape \(4, 2, 2\)"),
        ({"images": [*images[:2], torch.zeros(3, 1, 2, 2)]}, r"it must be \(4, 1, H, W\)"),
        ({"images": [*images[:2], torch.zeros(4, 1, 0, 2)]}, "images: number 2"),
        ({"t": torch.tensor([1, 2])}, r"t: shape \(2,\); it must be \[3\]"),
        ({"t": torch.tensor([1, 2, 1000])}, r"t: \[1, 2, 1000\]; each must lie in 0 … 999"),
        ({"labels": torch.tensor([1, 2, 8])}, r"labels: \[1, 2, 8\]; each must lie in 0 … 7"),
        ({"labels": torch.tensor([1, 2, -1])}, r"labels: \[1, 2, -1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    for arguments, message in [
        ({"t": torch.tensor([0.1, 0.2, 0.3])}, r"t: torch\.float32; it must be int32 or int64"),
        ({"t": [1, 2, 3]}, r"t: list; it must be a tensor \[3\]"),
        ({"labels": None}, r"labels: NoneType; it must be a tensor \[3\]"),
        ({"images": torch.zeros(3, 4, 1, 2, 2)}, "images: a tensor; it must be a sequence"),
    ]:
        with pytest.raises(TypeError, match=message):
            call(**arguments)
    for options, message in [
        ({"generator": [torch.Generator()]}, "generator: 1 for 3 images"),
        ({"channels": 0}, "channels: 0; it must be at least 1"),
        ({"guidance": torch.ones(2)}, r"guidance: shape \(2,\); it must be a number or \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            dit.sample(tiny(), images, labels, steps=2, **options)
