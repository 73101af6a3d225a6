"""Real devices, simulated: what each would need, who is away, late or lost, on a clock that waits for nobody."""
