//! Random trees with the extremes of every field.
