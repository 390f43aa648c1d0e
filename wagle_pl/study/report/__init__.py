"""The report of models and studies: sources are read, sections made of them, templates filled."""
