"""What the machine does beside the training: GPU gauges and host memory, read off the loop."""
