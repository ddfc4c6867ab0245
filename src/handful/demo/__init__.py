"""What `handful demo` shows."""
