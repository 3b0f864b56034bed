"""Generation: tasks, the engine that runs them, videos and images on disk."""
