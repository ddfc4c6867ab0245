"""Operations and memory, before anything runs."""
