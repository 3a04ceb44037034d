"""What is in an engine file or a bundle, told without running it."""
