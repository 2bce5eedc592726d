"""Modules of the original package that other programs build models of."""
