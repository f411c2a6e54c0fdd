"""The policy is the student's model; teachers lend it other weights."""
