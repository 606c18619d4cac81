"""A factored model in, a better one out: local learning with SVD-structured feedback."""
