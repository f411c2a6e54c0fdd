"""What a run holds on a GPU is counted from shapes, before anything is loaded."""
