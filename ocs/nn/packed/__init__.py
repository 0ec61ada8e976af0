"""Quantized layers whose weights stay packed in k bits."""
