"""Workers of two ranks on two cores beside a worker of one."""
