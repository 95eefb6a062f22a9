"""What is written while a run works: journals to resume from, the run log, interrupts."""
