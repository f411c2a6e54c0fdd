"""The loss turns the teacher's views into a target for the student.

This package handles tensors; it knows neither text nor the model that the tensors come from.
"""
