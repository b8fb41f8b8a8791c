//! The discovery document.
