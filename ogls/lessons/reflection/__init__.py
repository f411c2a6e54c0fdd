"""Reflections say where a rollout first goes wrong, and which idea it lacks.

The method is ROSD (arXiv 2605.28014).
"""
