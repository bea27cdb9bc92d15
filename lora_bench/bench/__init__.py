"""What does it cost: workloads, clocks, memory, and the interleaved comparison of deployment set-ups."""
