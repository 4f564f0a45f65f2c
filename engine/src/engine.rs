//! The public verbs.

/// One store as one process sees it.
#[derive(Debug)]
pub struct Engine;
