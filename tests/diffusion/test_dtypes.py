"""One rule: noise, state, targets and loss are float32; a model computes in its own dtype, or in autocast's."""

import contextlib
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from sora_fast.diffusion import DDIM, DDPM, DPMSolver2M, Euler, Guided, RectifiedFlow, sample, training_loss
from sora_fast.models import SoraDiT
from sora_fast.models.text import ByteTextEncoder, PackedText
from sora_fast.packing import Conditioning, PackedLayout, RaggedLatents
from tests.models.test_sora_dit import PATCH, levels, pack, small, videos

# Of the weights, and of autocast.
FORMS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast": (torch.float32, torch.bfloat16),
}
# How far the results may be from those in float64, as a share of their size: some roundings of the dtype.
TOLERANCES = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02, "autocast": 0.1}
TEXTS = ["a", "bcd", ""]

forms = pytest.mark.parametrize("form", FORMS)


class Case:
    """A model with text in one of the forms, on float32 latents."""

    def __init__(self, form: str) -> None:
        torch.manual_seed(0)
        dtype, self.amp = FORMS[form]
        self.encoder = ByteTextEncoder(16, layers=1)  # stays float32, whatever the model is
        self.model: SoraDiT = small(text_dim=16, pooled_dim=16, position="rope+sincos3d").to(dtype)
        self.latents, self.layout = pack(videos())

    def computing(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cpu", self.amp, enabled=self.amp is not None)

    def text(self, prompts: list[str]) -> PackedText:
        return self.encoder(*self.encoder.tokenize(prompts))

    def denoise(self, latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        assert latents.flat.dtype == torch.float32, "the state"
        return self.model(latents, layout, conditioning, text=self.text(TEXTS))

    def loss(self) -> tuple[Tensor, list[Tensor]]:
        sigma = torch.tensor([0.2, 0.5, 0.8])
        noise = torch.randn(self.latents.flat.shape, generator=torch.Generator().manual_seed(0))
        options = {"noise": noise, "patch_size": PATCH}
        with self.computing():
            loss = training_loss(self.denoise, self.latents, self.layout, RectifiedFlow(), sigma, **options)
        return loss.detach(), list(torch.autograd.grad(loss, list(self.model.parameters())))


def close(actual: Tensor, expected: Tensor, form: str) -> None:
    assert (actual.double() - expected.double()).norm() <= TOLERANCES[form] * expected.double().norm()


@forms
def test_training(form: str) -> None:
    (loss, grads), (exact_loss, exact_grads) = Case(form).loss(), Case("float64").loss()
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {FORMS[form][0]}
    close(loss, exact_loss, form)
    close(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in exact_grads]), form)


@forms
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("path", "sampler"), [(RectifiedFlow(), Euler()), (RectifiedFlow(), DPMSolver2M()), (DDPM(), DDIM())]
)
def test_sampling(path: object, sampler: object, guided: bool, form: str) -> None:
    results = []
    for one in (form, "float64"):
        case = Case(one)
        model = case.denoise
        if guided:
            text, null_text = case.text(TEXTS), case.text([""] * 3)
            model = Guided(case.model, case.layout, scale=3.3, text=text, null_text=null_text)
        with case.computing():
            results.append(sample(model, case.latents, case.layout, path, sampler, steps=2, patch_size=PATCH))
    assert results[0].flat.dtype == torch.float32
    close(results[0].flat, results[1].flat, form)


@forms
def test_a_model_speaks_in_its_own_dtype(form: str) -> None:
    case = Case(form)
    text = case.text(TEXTS)
    with case.computing():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            latents = case.latents.with_flat(case.latents.flat.to(dtype))
            if case.amp is not None and dtype == torch.float64:
                continue  # autocast leaves float64 alone, as it does everywhere in PyTorch
            output = case.model(latents, case.layout, levels(case.layout), text=text)
            assert output.flat.dtype == (case.amp or FORMS[form][0])


def test_the_state_is_not_rounded_to_the_models_dtype() -> None:
    """Many small steps of a model in bfloat16: rounded after each, the state would stay behind."""
    case = Case("bfloat16")
    latents = case.latents.with_flat(torch.ones_like(case.latents.flat))

    def drift(latents: RaggedLatents, layout: PackedLayout, conditioning: Conditioning) -> RaggedLatents:
        return latents.with_flat(torch.ones_like(latents.flat, dtype=torch.bfloat16))

    made = sample(drift, latents, case.layout, RectifiedFlow(), Euler(), steps=1000, patch_size=PATCH)
    torch.testing.assert_close(made.flat, torch.zeros_like(made.flat), rtol=0, atol=1e-5)


@forms
def test_bfloat16_data_train_in_float32(form: str) -> None:
    case, rounded = Case(form), Case(form)
    rounded.latents = case.latents.with_flat(case.latents.flat.bfloat16())
    case.latents = deepcopy(case.latents).with_flat(rounded.latents.flat.float())
    assert torch.equal(rounded.loss()[0], case.loss()[0])
