"""Noise paths, the training loss, samplers and guidance over packed latents."""

from sora_fast.diffusion.clean import clean_frames, random_clean_ends
from sora_fast.diffusion.flow_map import FlowMap
from sora_fast.diffusion.guidance import Guided
from sora_fast.diffusion.losses import training_loss
from sora_fast.diffusion.noise import noise_like
from sora_fast.diffusion.paths import DDPM, NoisePath, RectifiedFlow
from sora_fast.diffusion.samplers import DDIM, Ancestral, DPMSolver2M, Euler, Heun, Sampler
from sora_fast.diffusion.sampling import sample

__all__ = [
    "DDIM",
    "DDPM",
    "Ancestral",
    "DPMSolver2M",
    "Euler",
    "FlowMap",
    "Guided",
    "Heun",
    "NoisePath",
    "RectifiedFlow",
    "Sampler",
    "clean_frames",
    "noise_like",
    "random_clean_ends",
    "sample",
    "training_loss",
]
