"""Video and text towers and what is built of them."""
