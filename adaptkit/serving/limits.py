"""What a server does at most, so that no request takes it from the others."""

from __future__ import annotations

from dataclasses import dataclass, fields

from adaptkit.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What is accepted, and how images are gathered into batches.

    Args:
        body_bytes: Largest body of a request.
        pixels: Largest image, in pixels; larger ones aren't decoded.
        images: Images in a request.
        seconds: Time for a request's head to arrive, again for its body, and again for it to be answered.
        requests: Predictions worked on at once; further ones are told to come again.
        waiting: Images in the server at once, over all requests.
        batch: Images encoded at once.
        wait: Seconds that a batch waits for images that are being decoded.

    Raises:
        ConfigError: A value that isn't above 0.
    """

    body_bytes: int = 16 * 2**20
    pixels: int = 50_000_000
    images: int = 16
    seconds: float = 30.0
    requests: int = 64
    waiting: int = 256
    batch: int = 32
    wait: float = 0.01

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"The limit {item.name} is {value!r}, but must be above 0.")
        if self.images > self.waiting:
            raise ConfigError(
                f"A request may hold {self.images} images, but only {self.waiting} may wait: raise one or lower the"
                " other."
            )
