"""Generated images of digits (UltraMNIST) and their export."""
