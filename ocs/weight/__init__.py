"""One weight, step by step: its split plan, clip threshold and integers, and the error that is left."""
