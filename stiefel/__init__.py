"""The public face of Stiefel: what users import."""
