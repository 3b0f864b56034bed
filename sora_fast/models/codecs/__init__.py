"""Codecs: from videos to the latents that a model denoises, and back."""

from sora_fast.models.codecs.codec import Codec, UnfitFrames
from sora_fast.models.codecs.identity import IdentityCodec
from sora_fast.models.codecs.spec import LatentSpec

__all__ = ["Codec", "IdentityCodec", "LatentSpec", "UnfitFrames"]
