"""What any job needs that may be interrupted: its directory, resume, provenance, manifest, progress."""
