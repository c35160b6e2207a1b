"""What was learned: what a policy sees, its networks or tables, its use on a new task. No Ray."""
