"""Requests to forget rows, and the register that keeps a record of them."""
