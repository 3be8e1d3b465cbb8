"""Hostile input: tables of cases and fuzzed bytes. None may end in anything but one clear line."""
