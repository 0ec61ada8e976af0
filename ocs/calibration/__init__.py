"""What data says of the inputs of each layer."""
