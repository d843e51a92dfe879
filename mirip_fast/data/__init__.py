"""What the data is: images, grades, splits, pairs."""
