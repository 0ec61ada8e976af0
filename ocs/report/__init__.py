"""What people look at: the report of a quantized model, and pictures."""
