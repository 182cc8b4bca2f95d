//! What each kind of operation does, as lists of steps.

pub mod addresses;
pub mod image;

pub mod create;
pub mod delete;
pub mod migration;
pub mod power;
pub mod restore;
pub mod snapshot;

use berth_model::operation::OperationKind;

/// Whether an operation of this kind that succeeds puts an end to the trouble that a VM was in.
pub(crate) const fn makes_well(kind: OperationKind) -> bool {
    match kind {
        OperationKind::VmCreate
        | OperationKind::VmStart
        | OperationKind::VmRestart
        | OperationKind::VmMigrate
        | OperationKind::SnapshotRestore => true,
        OperationKind::VmShutdown
        | OperationKind::VmStop
        | OperationKind::VmPause
        | OperationKind::VmResume
        | OperationKind::VmDelete
        | OperationKind::SnapshotCreate
        | OperationKind::SnapshotDelete
        | OperationKind::ImageDelete => false,
    }
}

macro_rules! stub {
    ($($(#[$doc:meta])* $name:ident $kind:ident)*) => {$(
        $(#[$doc])*
        pub enum $name {}
        impl crate::operations::step::Workflow for $name {
            type Record = ();
            const KIND: berth_model::operation::OperationKind = berth_model::operation::OperationKind::$kind;
            const STEPS: &'static [crate::operations::step::Step<Self>] = &[];
            async fn check<'a>(
                _desk: &'a crate::operations::step::Desk<'a>,
                _request: &'a crate::operations::OperationRequest,
            ) -> Result<crate::operations::step::Plan<Self>, berth_model::Problem> {
                Err(crate::operations::step::wrong_request())
            }
        }
    )*};
}
pub(crate) use stub;
