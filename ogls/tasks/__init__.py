"""Tasks say what is asked and what is right: problems, verifiers, grading.

This package handles text and does without torch.
"""
