"""Training: one loop, stages in order, checkpoints, the run folder."""
