"""Observers of a running stage: metrics, watchdog, interrupts, spikes."""
