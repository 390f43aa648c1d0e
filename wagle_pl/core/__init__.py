"""What all parts need: errors, files, seeds, classes by name, ranks."""
