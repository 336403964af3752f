//! Tars that break a rule, each refused for that rule.
