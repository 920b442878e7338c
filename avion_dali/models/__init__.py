"""Video and text towers, the models built from them, and their weights."""
