"""Phase two: learning to score from cached features."""
