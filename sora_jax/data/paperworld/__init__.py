"""Paperworld: an endless, seeded world of moving paper cut-outs, with captions and an oracle."""
