"""The codec that changes nothing: models of pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sora_fast.models.codecs.codec import Codec
from sora_fast.models.codecs.padding import Padded
from sora_fast.models.codecs.spec import LatentSpec


@dataclass(frozen=True)
class IdentityCodec(Codec):
    """The pixels themselves are the latents; decoding returns to the range [−1, 1].

    lead: copies of the first frame that go before it, and are dropped again. With patches of lead + 1 frames the first
        frame so has patches of its own, as causal codecs give it a latent frame of its own: an image is then a video
        of one frame, and a single image can be what a video begins with.
    """

    channels: int = 3
    lead: int = 0
    bounded = False  # what it is given it gives back

    @staticmethod
    def for_patches(channels: int, patch_size: tuple[int, int, int]) -> "IdentityCodec":
        """With the lead that gives the first frame patches of its own."""
        return IdentityCodec(channels, lead=patch_size[0] - 1)

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(channels=self.channels, lead=self.lead)

    def _encoded(self, videos: Sequence[Padded]) -> list[Tensor]:
        return [padded.frames(-self.lead, padded.video.shape[1]) for padded in videos]

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        for number, code in enumerate(latents):
            yield number, 0, code[:, self.lead :]
