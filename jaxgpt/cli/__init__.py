"""How every command starts and ends: flags in, exit code out."""
