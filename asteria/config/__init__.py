"""Frozen settings, checked once when they are made."""
