"""One click command a stage: params and paths become keyword arguments, errors become exit codes."""
