"""What data, real or synthesized, can mend in a model."""
