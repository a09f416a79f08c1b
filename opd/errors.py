"""What a user can get wrong, said in one sentence: which part, what it needs, what it got, what to do."""


class OpdError(Exception):
    """The run cannot be right and stops; the message is one sentence for the person who started it."""


class ConfigurationError(OpdError):
    """The request itself is wrong; found before anything was started."""


class DataError(OpdError):
    """A prompt, a checkpoint or a testimony is not what it claims to be."""


class ServiceLost(OpdError):
    """Whoever should have answered is gone; the request was not at fault, and another may be asked."""


class ServiceVanished(ServiceLost):
    """A service that is gone, and nothing is known of why: another one need not fare alike."""


class ServiceHung(ServiceLost):
    """Whoever should have answered says himself that he is stuck."""
