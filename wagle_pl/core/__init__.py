"""What every room needs: errors, files, seeds, classes by name, ranks."""
