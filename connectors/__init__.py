"""Connectors: one module for each kind of store."""
