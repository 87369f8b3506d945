"""The package under both notebooks; the README says what lies where."""


class InputError(ValueError):
    """Something the user gave can't be used. The message is one line and names the mend."""
