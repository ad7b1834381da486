"""The story of a run on one page: what was kept, what it costs, and how to repeat it."""
