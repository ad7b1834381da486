"""What a model gets right, what it costs, and whether a difference is more than chance."""
