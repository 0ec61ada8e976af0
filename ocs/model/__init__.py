"""What a model is made of: its layers, its graph, and how parts of it are exchanged."""
