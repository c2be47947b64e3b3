"""Plans without the hardware: memory, time and price of an experiment on given chips."""
