"""Compiles the real steps of a config for a TPU slice that is not there, and reads what they cost.

Nothing here runs on a chip: every time, rate and cost is predicted.
"""
