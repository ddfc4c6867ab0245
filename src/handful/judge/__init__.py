"""A set against real images: numbers, audit, copies, utility."""
