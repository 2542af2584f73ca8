"""Pennyweight."""
