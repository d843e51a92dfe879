"""What both training loops share."""
