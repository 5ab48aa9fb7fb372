"""Reads deployment files before anything is launched: what is wrong, what goes where, a drawing."""
