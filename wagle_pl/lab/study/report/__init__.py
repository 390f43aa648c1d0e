"""Reports of models and studies: reads sources, makes sections of them, fills templates."""
