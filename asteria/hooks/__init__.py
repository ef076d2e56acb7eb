"""When a gradient is final: hooks on the backward pass."""
