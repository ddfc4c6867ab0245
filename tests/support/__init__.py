"""What several test files share; pytest puts this folder's parent on the path (pyproject.toml)."""
