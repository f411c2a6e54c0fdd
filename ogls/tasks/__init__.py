"""What is asked and what is right: problems, verifiers, error locators, grading. No torch."""
