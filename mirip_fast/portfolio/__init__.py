"""Using a trained model on works that nobody has graded."""
