"""Many runs of one config: which, how, and what came of them."""
