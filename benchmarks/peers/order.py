"""The order of tokens that peers want."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_fast.packing import PackedLayout


@dataclass(frozen=True, eq=False)
class Raster:
    """Takes the tokens of a layout without padding into raster order and back. Other tensors stay as they are."""

    places: Tensor  # [N]: of the token that comes n-th in raster order
    inverse: Tensor

    @staticmethod
    def of(layout: PackedLayout) -> "Raster":
        places = torch.argsort(layout.segment_ids.long() << 32 | layout.raster_index)
        return Raster(places, torch.argsort(places))

    def pack(self, x: Tensor) -> Tensor:
        return x[self.places] if self._is_of_tokens(x) else x

    def unpack(self, x: Tensor) -> Tensor:
        return x[self.inverse] if self._is_of_tokens(x) else x

    def _is_of_tokens(self, x: Tensor) -> bool:
        """No weight has as many rows as a pack has tokens."""
        return x.ndim > 1 and x.shape[0] == len(self.places)
