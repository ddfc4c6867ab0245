"""What is asked for: schema, file, what the model decides, the plan."""
