"""Argument values: masks, sequences, rotary tables, gears, dropout states."""
