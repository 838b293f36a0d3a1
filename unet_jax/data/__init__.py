"""Datasets as Sources of pictures, decoded once into cached uint8 arrays."""
