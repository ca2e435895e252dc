"""Rectified flow: path, times, loss, guidance and samplers; knows no model."""
