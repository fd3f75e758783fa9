"""Recipes of the language methods."""
