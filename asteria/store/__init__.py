"""Where the state of blocks is kept; knows bytes and names, no algorithm."""
