"""The lab: load, demonstration and what users can prove for themselves."""
