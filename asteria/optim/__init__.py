"""The optimizers: signatures, routing of parameters to blocks, and torch's optimizer contract."""
