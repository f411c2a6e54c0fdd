"""Whose weights: the student's model, its teacher, and their states."""
