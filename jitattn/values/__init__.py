"""What users pass: masks, sequences, rotary tables, gears, dropout states."""
