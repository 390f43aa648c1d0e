"""What we find out with: studies, plants, reports, plans and further attacks.

The suite never imports it; ``wagle`` finds its commands, and the registry its classes, by name.
"""
