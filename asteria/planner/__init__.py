"""What training will take, from shapes and settings alone: bytes, traffic, seconds, staleness."""
