//! Damaged
