"""Lessons say who is learned from, what a teacher reads, which tokens count.

This package handles text and token ids, and does without torch.
"""
