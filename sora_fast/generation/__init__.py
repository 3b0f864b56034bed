"""Generation: tasks, and the engine that runs them."""
