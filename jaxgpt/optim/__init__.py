"""Learning-rate schedules, decay masks and optimizers."""
