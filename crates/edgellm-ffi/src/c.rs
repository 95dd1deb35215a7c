//! The same interface in plain C.
