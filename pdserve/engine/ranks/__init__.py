"""A worker of several ranks, a process each: what they say to each other, how they end."""
