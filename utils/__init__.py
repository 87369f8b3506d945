"""What the notebooks import: recipes, data, transforms, model, schedule, training, pictures."""


class InputError(ValueError):
    """Something the user gave can't be used. The message is one line and names the mend."""
