"""Videos and images on disk: read into tensors, written from tensors.

Needs PyAV and Pillow: `pip install sora-fast[video]`.
Everywhere in this package a video is a float tensor (C, T, H, W) with values in [-1, 1]; an image has T = 1.
"""

from sora_fast.media.frames import UnreadableMedia
from sora_fast.media.probing import Probe, probe, scaled
from sora_fast.media.read import Clip, read_clip, read_media
from sora_fast.media.timeline import Timeline
from sora_fast.media.write import UnwritableMedia, check_output, keep_unwritten, to_pixels, write_frames, write_media

__all__ = [
    "Clip",
    "Probe",
    "Timeline",
    "UnreadableMedia",
    "UnwritableMedia",
    "check_output",
    "keep_unwritten",
    "probe",
    "read_clip",
    "read_media",
    "scaled",
    "to_pixels",
    "write_frames",
    "write_media",
]
