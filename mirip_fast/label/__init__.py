"""`label`: people judge pairs of works on a local page, and the head learns from it; or they give tiers."""
