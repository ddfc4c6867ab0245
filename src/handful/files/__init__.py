"""One file on the disk: sealed, hashed, whole or not at all."""
