"""What a training step takes: samples from a source, planned into packs, made by processes, one after the other."""
