"""A cluster in one process, on virtual time: the code that serves, without sockets and waiting."""
