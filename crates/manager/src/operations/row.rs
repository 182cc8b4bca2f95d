//! An operation as it is written down.

use berth_model::operation::Operation;
use serde::{Deserialize, Serialize};

use super::request::OperationRequest;

/// Everything that the next manager needs to go on with an operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperationRow {
    /// What is shown of it.
    pub operation: Operation,
    /// What was asked for.
    pub request: OperationRequestText,
    /// The workflow's own record, of its own type ([`super::step::Workflow::Record`]).
    pub record: serde_json::Value,
    /// While undoing: how many of the workflow's steps are still to be undone, counted from its first.
    #[serde(default)]
    pub undo_left: usize,
    /// How many times the present step was begun anew after it had failed; part of its tasks' ids.
    #[serde(default)]
    pub attempt: u32,
}

/// A request as JSON text: kept for people who look into the store, never read back by the program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OperationRequestText(pub String);

impl From<&OperationRequest> for OperationRequestText {
    fn from(request: &OperationRequest) -> Self {
        Self(serde_json::to_string(request).expect("requests are plain data"))
    }
}
