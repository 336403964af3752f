//! Random tars, in random pieces.
