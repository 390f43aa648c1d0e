"""Figures and text tables of numbers that other rooms computed."""
