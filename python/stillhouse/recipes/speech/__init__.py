"""Recipes of the speech methods."""
