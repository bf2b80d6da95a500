"""Make a vector index better without re-embedding it."""

__version__ = "0.1.0"
