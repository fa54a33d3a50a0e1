"""What a user would run instead: one function for each, on the same weights and inputs."""
