//! Making steps fail on purpose.
//!
//! That each step may run twice and that each undo may follow a half-done step is a promise which only a test keeps
//! that tries all of them. A cluster in use has nobody who interferes.

use berth_model::operation::Operation;

/// What happens to a step, or to its undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meddling {
    /// Nothing out of the ordinary.
    None,
    /// It fails before it did anything.
    FailBefore,
    /// It is done, and then said to have failed, as if all that it learnt were lost.
    FailAfter,
    /// It is done, what it learnt is lost, and it is done again, as after a manager's death.
    Twice,
    /// It panics half-way.
    Panic,
}

/// Somebody who interferes.
pub trait Interference: Send + Sync + 'static {
    /// Asked before each step, and before each undo.
    fn meddle(&self, operation: &Operation, step: &'static str, undoing: bool) -> Meddling;
}
