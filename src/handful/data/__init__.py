"""Images, folders of them, exemplars."""
