"""One line for the trainers that people use. Each module imports its trainer when it is first used, not before."""
