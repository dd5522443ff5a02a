"""Between formats: weights converted as streams, what a checkpoint is, and whether two of them hold the same weights."""
