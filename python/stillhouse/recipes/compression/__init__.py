"""Recipes for smaller models."""
