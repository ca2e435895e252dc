"""Text: strings to ids (`tokenizer`), ids to embeddings (`t5`); no training code.

Imports nothing, so that the tokenizer can be used without jax.
"""
