"""Composition root: brings mathematics, state and schedule together for one optimizer."""
