"""The command ``asteria``."""
