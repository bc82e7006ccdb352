"""A request that is answered with an error."""


class Refused(Exception):
    """A request that is refused: a status of HTTP, and one line of text for the client."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        """retry_after: seconds after which the request may succeed, if it may."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class ClientGone(Exception):
    """The client closed the connection before its request was answered."""
