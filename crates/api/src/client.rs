//! The client that fleetctl and the tests use.
