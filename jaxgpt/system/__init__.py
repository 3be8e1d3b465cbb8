"""What every room may use: errors, messages, whole files, object stores, optional packages."""
