"""Suites that score what a checkpoint generates; no training code."""

from sora_jax.evaluate.suites import SUITES, chosen_tasks, find_suite, run_suite

__all__ = ["SUITES", "chosen_tasks", "find_suite", "run_suite"]
