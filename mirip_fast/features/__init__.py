"""Phase one: what the frozen backbone sees, kept in a cache."""
