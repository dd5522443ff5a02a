"""The student learns: one optimizer step, the objectives, checkpoints, and the run around them."""
