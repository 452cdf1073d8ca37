"""Training: the loop and what it counts and prints, and what a language model writes at the end."""
