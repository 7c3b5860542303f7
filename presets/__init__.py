"""Parameters for common tasks, one file each, that `decant init` copies into a new project."""
