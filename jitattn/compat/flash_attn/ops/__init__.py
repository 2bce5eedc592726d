"""Operations of the original package beside the attention functions."""
