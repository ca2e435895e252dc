"""The diffusion transformer of the Wan family (Wan Team 2025, arXiv:2503.20314)."""
