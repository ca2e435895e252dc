"""Training: `loop.train(config, workdir)` runs either stage."""
