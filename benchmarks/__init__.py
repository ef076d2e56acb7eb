"""Measurements that back the claims of the README; each module runs with ``python -m``."""
