"""Running programs: plain runs, passes over packed rows, metrics; and the hooks backend that checks them."""
