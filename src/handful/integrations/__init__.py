"""Our terms inside other people's libraries."""
