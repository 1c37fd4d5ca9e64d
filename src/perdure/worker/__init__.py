"""Claims runs and takes their turns: one worker's life, from its announcement to its end."""
