"""Modules, and the stateless functions that several domains share."""
