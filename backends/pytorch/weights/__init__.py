"""A model's weights: read from checkpoints, made at random, converted, saved."""
