"""From views to a target, from target and student to a loss and its gradient. Tensors only: knows no policy."""
