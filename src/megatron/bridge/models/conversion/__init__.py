"""Conversion: rows of names and layouts, expanded into a plan that is proven before it runs."""
