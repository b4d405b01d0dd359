"""What a checker raises."""


class Violation(AssertionError):
    """A property does not hold; the simulation ends here."""
