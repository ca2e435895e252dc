"""The image encoder whose features some transformers attend to."""
