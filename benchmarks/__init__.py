"""What the project reaches on this machine, against real servers (`make bench`)."""
