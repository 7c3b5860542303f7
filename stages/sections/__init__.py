"""The sections of `params.yaml`, one model each; a stage imports only its own."""
