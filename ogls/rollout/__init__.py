"""Engines sample rollouts, a guard watches them, and accuracy is measured."""
