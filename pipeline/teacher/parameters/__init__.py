"""The sections `teachers.T` of `params.yaml`, one module each: a stage imports only its own."""
