"""How good is the student: graders of responses, and accuracy on held-out prompts."""
