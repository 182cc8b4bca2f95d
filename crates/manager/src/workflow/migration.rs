//! Stub.
super::stub! { MigrateVm VmMigrate }
