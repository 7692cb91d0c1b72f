"""Text as bytes: its sources (corpus), samples of it (stream), simple models of it (baselines); small tasks (tasks)."""
