"""`label`: a person judges pairs of works on a local page, and the head learns from it meanwhile."""
