"""The programs that draw: each tells a session its model, and the noise level of every call."""
