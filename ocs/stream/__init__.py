"""Models that memory does not hold: quantized from files to files."""
