"""What observes a running stage: metrics, watchdog, interrupts, spikes."""
