//! The test-suite every store must pass.
