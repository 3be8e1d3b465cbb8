"""What a run reports: rows, TensorBoard events, the progress line, throughput and MFU."""
