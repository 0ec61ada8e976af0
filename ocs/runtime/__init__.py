"""Integers that run: lowered to plain torch, compiled, and compared with what they came from."""
