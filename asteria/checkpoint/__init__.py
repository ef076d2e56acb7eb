"""State dicts: what they hold, made smaller, or taken from other optimizers. Pure functions."""
