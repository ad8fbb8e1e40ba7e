//! Turnhouse.
