"""The one way a structure is turned away: a code to count by and a sentence to read."""


class Refused(ValueError):
    """A structure that cannot be used. `code` is a short kebab-case word for counting, the message one line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message.strip().splitlines()[0] if message.strip() else code

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
