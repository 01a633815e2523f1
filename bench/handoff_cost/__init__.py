"""What a handoff costs beside its bytes."""
