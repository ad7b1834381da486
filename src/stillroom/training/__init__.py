"""The training loop, its checkpoints, and what happens inside one step."""
