"""What quantize() decides for each layer: options, splits, bits, and the layer that follows from them."""
