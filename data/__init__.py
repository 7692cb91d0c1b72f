"""Text as bytes: where it comes from (corpus), samples cut from it (stream), simple models of it (baselines)."""
