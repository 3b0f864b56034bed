"""The main job: a small model learns real handwritten digits that move, and is measured by an independent eye."""
