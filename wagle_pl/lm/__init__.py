"""The language model: loading, saving, its layers, likelihood and generation."""
