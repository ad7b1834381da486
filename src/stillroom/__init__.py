"""Stillroom: distil a fine-tuned encoder into a small, fast one, and prove what was kept."""
