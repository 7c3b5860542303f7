"""One click command a stage: parameters become keyword arguments, errors exit codes."""
