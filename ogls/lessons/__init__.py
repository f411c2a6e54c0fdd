"""What is taught: who is learned from, what the teacher reads, which tokens count. No torch."""
