"""Training on images, end to end."""
