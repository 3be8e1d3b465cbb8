"""Used everywhere: errors, messages, atomic file writes, object stores, optional packages."""
