"""Other people's data structures and checkpoints, as this package takes them: one file for each project or format."""
