"""What the planner predicts for the demo cluster beside what that cluster does."""
