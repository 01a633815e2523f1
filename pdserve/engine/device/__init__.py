"""Models on devices other than the CPU: attention, memory, graphs, sampling."""
