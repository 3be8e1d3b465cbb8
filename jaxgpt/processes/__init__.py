"""Several processes that train as one, and the signals that stop them."""
