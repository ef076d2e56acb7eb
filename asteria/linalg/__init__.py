"""Linear algebra on stacks of blocks; no state, no schedule, no optimizer."""
