"""Operations that callers import beside the attention functions."""
